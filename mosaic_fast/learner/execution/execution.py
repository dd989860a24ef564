"""Forward and backward over a forest. How it is run is decided once a step, and changes no result.

`Execution.schedule` chooses the plan, `logprobs` and `backward` run it. `KeptPrefix` is a forward on whose
keys and values later ones stand, and which takes their gradients back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from mosaic_fast.distributed import ALONE, World
from mosaic_fast.learner.execution.cost import (
    CostModel,
    default_cost_model,
    node_seconds,
    share_of,
    shares,
    work_of,
)
from mosaic_fast.learner.execution.coupling import second_passes
from mosaic_fast.learner.execution.schedule import PLANS, Forward, Schedule, cut, hold, unmerged, whole
from mosaic_fast.policy import Policy
from mosaic_fast.policy.attention import KeysAndValues
from mosaic_fast.policy.forest_tensors import ForestTensors, IntArray, forest_tensors
from mosaic_fast.policy.layout import checkpoints_activations, checkpoints_reentrantly
from mosaic_fast.policy.policy import ForwardResult
from mosaic_kernels import PackedForest, pack_forest
from mosaic_kernels.fixed_order import pick
from mosaic_kernels.forest.ideal import ModelShape
from mosaic_rollout.types import JsonValue


class KeptPrefix:
    """What a forward is kept for as leaves, and the sum of the gradients that branches have for them.

    That is its keys and values, and the states in which its recurrent layers ended.

    The forward's graph is kept until its last branch is done, then runs backward once, from its own loss and
    from these sums together: the chain rule through the whole tree, with every node forwarded once. Under
    activation checkpointing the graph is the layers' inputs, and each layer runs a second time in that one
    backward pass, as it would without branches.
    """

    def __init__(self, index: int, keys_and_values: KeysAndValues, loss: Tensor | None = None) -> None:
        self.index, self._loss = index, loss
        self.leaves: KeysAndValues = {
            name: tuple(x.detach().requires_grad_(x.requires_grad) for x in made)
            for name, made in keys_and_values.items()
        }
        self._made = [x for made in keys_and_values.values() for x in made]
        self._leaves = [x for leaves in self.leaves.values() for x in leaves]
        self._sums: list[Tensor | None] = [None] * len(self._made)

    def collect(self) -> None:
        """Take over the gradient that a branch's backward pass has left, in fp32 or wider."""
        for index, leaf in enumerate(self._leaves):
            if leaf.grad is None:
                continue
            grad = leaf.grad.to(torch.promote_types(leaf.dtype, torch.float32))
            total = self._sums[index]
            self._sums[index] = grad if total is None else total.add_(grad)
            leaf.grad = None

    def backward(self) -> None:
        """Run the forward's own backward pass, after that of its last branch."""
        roots: list[Tensor] = []
        grads: list[Tensor | None] = []
        if self._loss is not None:
            roots.append(self._loss)
            grads.append(None)
        for made, total in zip(self._made, self._sums, strict=True):
            if total is not None:
                roots.append(made)
                grads.append(total.to(made.dtype))
        if roots:
            torch.autograd.backward(roots, grads)


logger = logging.getLogger("mosaic_fast")


def nothing(last: bool) -> None:
    """What one process does before a backward pass."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward gives: log-probs of the rollout tokens that it owns.

    Each trained rollout token is owned by one micro-batch of a schedule. A forward that owns none gives
    none.
    """

    forward: Forward
    source: Tensor  # [N] int64, index of each owned token among the forest's T
    logprobs: Tensor  # [N] differentiable
    entropy: Tensor  # [N] differentiable, of the distribution that predicted the token


FORWARD_SHARE = 1 / 3
"""Of a forward and backward pass's time, the forward's: a backward pass has twice its multiply-adds."""


class Execution:
    """Runs schedules. How a forest is run changes results by rounding only.

    The plan is the one for which the cost model predicts the shortest forward and backward pass: the forest
    in one forward (`tree`), cut with repeated context (`cut`), with shared prefixes kept (`kept`), or its
    rollouts without sharing (`flat`). The prediction depends on the forest, the model's shape and the
    coefficients alone: nothing is measured to make it.

    On several ranks each runs a share of the rollouts, and all run as many forwards as the one with the most:
    the collectives inside a forward want everyone. For the same reason nothing is held there, whose forwards
    and backward passes would come in another order on each rank.
    """

    def __init__(
        self,
        tokens_per_microbatch: int,
        temperature: float,
        shape: ModelShape,
        cost: CostModel | None = None,  # None: the shipped coefficients
        *,
        plan: str = "auto",  # or one of PLANS
        world: World = ALONE,
        before_pass: Callable[[bool], None] = nothing,  # told whether a pass is an update's last one
    ) -> None:
        if plan not in ("auto", *PLANS):
            raise ValueError(f"plan must be 'auto' or one of {', '.join(PLANS)}, got {plan!r}")
        self._budget, self._temperature, self._shape = tokens_per_microbatch, temperature, shape
        self._cost, self._plan, self.world = cost or default_cost_model(), plan, world
        self._before_pass = before_pass
        self._tensors: WeakKeyDictionary[Forward, ForestTensors] = WeakKeyDictionary()
        self._cuts: WeakKeyDictionary[Schedule, Schedule] = WeakKeyDictionary()
        self._one_token: ForestTensors | None = None
        self._figures: dict[str, float] = {}
        self._passes: list[Callable[[], float]] = []  # read the seconds of each pass of the last schedule

    def schedule(
        self, forest: PackedForest, unit_of: IntArray | None = None, rollouts: IntArray | None = None
    ) -> Schedule:
        """Choose a plan. ValueError if a rollout alone exceeds the budget; it says the budget needed.

        unit_of: [R] of a coupled loss, which runs some forwards twice; see `coupling_of`, rollouts as well.
        """
        own = self._own_share(forest)
        possible = {"cut": cut(own, self._budget)}
        if self.world.size == 1:
            possible["kept"] = hold(own, self._budget)
        if own.num_nodes <= self._budget:
            possible = {"tree": whole(own)}  # what a cut or a hold would give, too
        possible["flat"] = cut(unmerged(own), self._budget)
        if self._plan != "auto":
            name = "tree" if self._plan in ("cut", "kept") and "tree" in possible else self._plan
            if name not in possible:
                if name == "kept":
                    raise ValueError("plan 'kept' needs one rank")
                raise ValueError(
                    f"plan {name!r} needs a budget of {own.num_nodes} tokens, it is {self._budget}"
                )
            possible = {name: possible[name]}
        predicted = {
            name: self._cost.predict(work_of(parts, self._shape)) for name, parts in possible.items()
        }
        seconds = dict(predicted)
        if unit_of is not None and self.world.size == 1:
            for name, parts in possible.items():
                again = work_of(second_passes(parts, forest, unit_of, rollouts), self._shape)
                seconds[name] += FORWARD_SHARE * self._cost.predict(again)
        best = min(seconds, key=lambda name: (seconds[name], PLANS.index(name)))
        parts = possible[best]
        if self.world.size > 1:
            parts = longest_first(parts, self._shape, self._cost)
        most = self.world.maximum(len(parts))
        schedule = Schedule(forest, parts, best, predicted, idle=most - len(parts))
        logger.debug(
            "plan %s: %d forwards of %d tokens for %d rollout tokens, predicted seconds %s",
            best, len(schedule.parts), schedule.packed_tokens, forest.num_tokens,
            ", ".join(f"{name} {seconds:.4f}" for name, seconds in predicted.items()),
        )  # fmt: skip
        self._figures = {f"tree/plan_{name}": float(name == best) for name in PLANS}
        self._figures |= {f"tree/predicted_{name}_s": seconds for name, seconds in predicted.items()}
        self._figures["tree/predicted_s"] = predicted[best]
        self._figures |= self._over_ranks(schedule, predicted[best])
        self._passes = []
        return schedule

    def supported(self, policy: Policy, schedule: Schedule) -> Schedule:
        """The schedule, or a cut one where the policy's way of checkpointing cannot keep a prefix."""
        if schedule.plan == "kept" and checkpoints_reentrantly(policy.model):
            return self._cut_instead(schedule)
        return schedule

    def figures(self) -> dict[str, float]:
        """Metrics of the last schedule: its plan, the predicted time of a pass, and the measured one.

        The prediction of a pass is in seconds of the machine whose coefficients were read.
        """
        if not self._passes:
            return dict(self._figures)
        seconds = [read() for read in self._passes]
        return {**self._figures, "time/tree_pass_s": sum(seconds) / len(seconds)}

    def _own_share(self, forest: PackedForest) -> PackedForest:
        """The forest of this rank's rollouts.

        The first rank decides for all: two machines that round differently must not decide differently.
        """
        if self.world.size == 1:
            return forest
        found: JsonValue = None
        if self.world.is_first:
            seconds = node_seconds(forest, self._shape, self._cost)
            found = [share.tolist() for share in shares(forest, seconds, self.world.size)]
        every = cast(list[list[int]], self.world.from_first(found))
        return share_of(forest, np.array(every[self.world.rank], np.int64))

    def _over_ranks(self, schedule: Schedule, predicted_s: float) -> dict[str, float]:
        """Forwards and tokens over all ranks, and how evenly the predicted time lies on them."""
        own: JsonValue = [float(len(schedule.parts)), float(schedule.packed_tokens), predicted_s]
        every = cast(list[list[float]], self.world.gather(own))
        parts, tokens, seconds = (list(values) for values in zip(*every, strict=True))
        figures = {"tree/microbatches": sum(parts), "tree/packed_tokens": sum(tokens)}
        if len(every) > 1 and max(seconds):
            figures["scale/balance"] = sum(seconds) / len(seconds) / max(seconds)
        return figures

    @torch.no_grad()
    def logprobs(self, policy: Policy, schedule: Schedule) -> tuple[Tensor, Tensor]:  # [T], [T]
        """Log-probs and entropies of all trained rollout tokens, zero elsewhere; no gradient."""
        double = policy.model.dtype == torch.float64
        shape = (2, schedule.forest.num_tokens)
        result = torch.zeros(
            shape, dtype=torch.float64 if double else torch.float32, device=policy.model.device
        )
        stack: list[tuple[int, KeysAndValues]] = []
        for index, part in enumerate(schedule.parts):
            while stack and stack[-1][0] != part.parent:
                stack.pop()
            forward, micro_batch = self._forward(policy, schedule, part, [held for _, held in stack])
            if part.kept:
                stack.append((index, forward.keys_and_values))
            if micro_batch is not None:
                result[0, micro_batch.source], result[1, micro_batch.source] = (
                    micro_batch.logprobs,
                    micro_batch.entropy,
                )
        for _ in range(schedule.idle):
            self._idle(policy)
        result = self.world.sum(result)  # each token is one rank's
        return result[0], result[1]

    def backward(self, policy: Policy, schedule: Schedule, loss_of: Callable[[MicroBatch], Tensor]) -> None:
        """Accumulate the gradient of the sum of `loss_of` over all micro-batches, each seen once."""
        schedule = self.supported(policy, schedule)
        self._note_held(policy, schedule)
        for part in schedule.parts:  # indices go to the device before it has work that they would wait for
            self._prepared(schedule, part, policy.model.device)
        stop = stopwatch(policy.model.device)
        stack: list[KeptPrefix] = []
        passes = len(schedule.parts) + schedule.idle
        for index, part in enumerate(schedule.parts):
            self._before_pass(index + 1 == passes)
            _finish(stack, part.parent)
            forward, micro_batch = self._forward(policy, schedule, part, [held.leaves for held in stack])
            loss = None if micro_batch is None else loss_of(micro_batch)
            if part.kept:
                stack.append(KeptPrefix(index, forward.keys_and_values, loss))
            elif loss is not None:
                loss.backward()
                for held in stack:
                    held.collect()
        _finish(stack, -1)
        for index in range(schedule.idle):
            self._before_pass(len(schedule.parts) + index + 1 == passes)
            (self._idle(policy) * 0.0).backward()
        self._passes.append(stop())

    def _note_held(self, policy: Policy, schedule: Schedule) -> None:
        """Record how many forwards are kept for later ones, and whether their layers run a second time."""
        held = sum(part.kept for part in schedule.parts)
        if not held or "tree/kept_prefixes" in self._figures:
            return
        again = checkpoints_activations(policy.model)
        self._figures |= {"tree/kept_prefixes": float(held), "tree/kept_recomputed": float(again)}
        way = "computed again once, as activations are checkpointed" if again else "kept"
        logger.debug("%d forwards are held, their graphs %s", held, way)

    def _idle(self, policy: Policy) -> Tensor:
        """Run the shortest forward that calls every module, one token predicting another: its log-prob."""
        if self._one_token is None:
            self._one_token = forest_tensors(pack_forest([[0, 0]]), policy.model.device)
        result = policy.run(self._one_token, longest_alone=2, temperature=self._temperature)
        return result.edge_logprobs.sum()

    def _forward(
        self, policy: Policy, schedule: Schedule, part: Forward, held: Sequence[KeysAndValues]
    ) -> tuple[ForwardResult, MicroBatch | None]:
        tensors = self._prepared(schedule, part, policy.model.device)
        result = policy.run(
            tensors,
            longest_alone=policy.check_lengths(part.forest, schedule.forest),
            temperature=self._temperature,
            return_entropy=True,
            held=held,
            keep=part.kept,
        )
        if result.row_entropy is None or not len(tensors.trained_tokens):
            return result, None
        return result, MicroBatch(
            part,
            tensors.uncut_tokens,
            pick(result.edge_logprobs, tensors.token_edges),
            pick(result.row_entropy, tensors.token_rows),
        )

    def _prepared(self, schedule: Schedule, part: Forward, device: torch.device) -> ForestTensors:
        """The indices of a forward on the device, kept for as long as its schedule is."""
        tensors = self._tensors.get(part)
        if tensors is None or tensors.tokens.device != device:
            above: list[IntArray] = []
            parent = part.parent
            while parent >= 0:
                nodes = schedule.parts[parent].nodes
                assert nodes is not None
                above.insert(0, nodes)
                parent = schedule.parts[parent].parent
            held = torch.cat([torch.from_numpy(nodes) for nodes in above]).numpy() if above else None
            tensors = self._tensors[part] = forest_tensors(part.forest, device, part.nodes, held)
        return tensors

    def _cut_instead(self, schedule: Schedule) -> Schedule:
        if schedule not in self._cuts:
            logger.warning("reentrant checkpointing keeps no graph to hold a prefix in: the forest is cut")
            parts = cut(schedule.forest, self._budget)
            self._cuts[schedule] = replace(schedule, parts=parts, plan="cut")
        return self._cuts[schedule]


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start a watch. Calling it stops it, and gives what reads its seconds.

    A call only queues work for a GPU: there its own clock counts, and reading waits until it has got so far.
    """
    if device.type != "cuda":
        start = time.perf_counter()

        def stop() -> Callable[[], float]:
            seconds = time.perf_counter() - start
            return lambda: seconds

        return stop

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    began = now()

    def stop_there() -> Callable[[], float]:
        ended = now()

        def read() -> float:
            ended.synchronize()
            return began.elapsed_time(ended) / 1e3

        return read

    return stop_there


def longest_first(parts: Sequence[Forward], shape: ModelShape, cost: CostModel) -> tuple[Forward, ...]:
    """Forwards that stand on no other by falling cost: ranks, which meet in each, then wait the least."""
    return tuple(sorted(parts, key=lambda part: -cost.predict(work_of([part], shape))))


def _finish(stack: list[KeptPrefix], parent: int) -> None:
    """Run the backward passes of all kept forwards below `parent`, the deepest first."""
    while stack and stack[-1].index != parent:
        stack.pop().backward()
        for held in stack:
            held.collect()
