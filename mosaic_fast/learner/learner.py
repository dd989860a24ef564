"""One update on the forest of a step's rollouts: credit, pruning, forward, loss, backward, optimiser.

Every distinct (prefix, token) is computed once, and the gradient is that of the flat batch with the same
weights. How the forest is cut, and in which order, changes it by rounding only.

`accumulate.py` has the ways to add up the gradient of a loss over micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mosaic_fast.config import Config
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.distributed.sharding import Sharding
from mosaic_fast.errors import UserError
from mosaic_fast.learner.accumulate import accumulate
from mosaic_fast.learner.execution import CostModel, Coupling, Execution, Schedule, coupling_of, units_of
from mosaic_fast.learner.execution.execution import nothing
from mosaic_fast.learner.optimizer import Optimizer
from mosaic_fast.learner.step_batch import Pruned, StepBatch, prune
from mosaic_fast.losses import Loss, LossBatch, SumCount, SurrogateLoss, build_loss, normalised_weights
from mosaic_fast.losses.batch import read_metrics
from mosaic_fast.losses.credit import assign_credit
from mosaic_fast.losses.gate import Gates
from mosaic_fast.losses.off_policy import importance, mismatch_figures
from mosaic_fast.policy import Policy
from mosaic_fast.policy.shape import Shape
from mosaic_fast.policy.support import depends_on_length
from mosaic_kernels import ideal_speedup
from mosaic_rollout.types import JsonValue


@dataclass(frozen=True)
class Reference:
    """The frozen policy of the KL term and of pairwise losses.

    selected: entered while it runs; a LoRA policy with its adapter off is its own reference.
    """

    policy: Policy
    selected: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class _Prepared:
    """What stays the same over the epochs of an update; arrays over the T' rollout tokens that are left."""

    pruned: Pruned
    schedule: Schedule
    coupling: Coupling | None  # None: the loss is a sum over tokens
    batch: LossBatch  # old_logprobs and advantages as if the trainer had sampled
    loss: Loss
    rollout_logprobs: Tensor  # [T']
    counted_tokens: int  # of the whole step, pruned or not


class Learner:
    """Trains the policy on the rollouts of one step at a time; owns the optimiser.

    Raises UserError for a loss that needs a reference and has none.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        config: Config,
        cost: CostModel | None = None,  # None: the shipped coefficients
        world: World = ALONE,
        sharding: Sharding | None = None,  # of the policy's weights, where there are several ranks
    ) -> None:
        self._loss = build_loss(config.loss)
        if self._loss.needs_reference and reference is None:
            raise UserError(f"loss.name = {config.loss.name!r} as configured needs a reference policy")
        self.policy, self.reference, self._config = policy, reference, config
        self._world, self._sharding = world, sharding
        masters = sharding is not None and sharding.masters
        self.optimizer = Optimizer(policy.model, config.optim, world, sharded_masters=masters)
        self._shape = Shape.of(policy.model.config)
        self._execution = Execution(
            config.forest.tokens_per_microbatch,
            config.rollout.temperature,
            self._shape,
            cost,
            world=world,
            before_pass=nothing if sharding is None else sharding.scatter_gradients,
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay, to lr times final_lr_frac at the last step. step: steps done.

        Three steps from 1 to 0.2 have 1, 0.6 and 0.2; a single step is the last one.
        """
        optim = self._config.optim
        last = (optim.schedule_steps or self._config.steps) - 1
        if step < min(optim.warmup_steps, last):
            return optim.lr * (step + 1) / optim.warmup_steps
        span = last - optim.warmup_steps
        passed = 1.0 if step >= last else (step - optim.warmup_steps) / span
        return optim.lr * ((1.0 - passed) + optim.final_lr_frac * passed)

    def update(self, batch: StepBatch, step: int) -> dict[str, float]:
        """Train on a step's rollouts; returns metrics by name.

        Raises TrainingError where a gradient is not finite; no step is taken with it.
        """
        prepared = self._prepare(batch)
        start: Tensor | None = None  # the policy's log-probs before the first optimiser step
        totals: dict[str, SumCount] = {}
        rate, norms = self.learning_rate(step), []
        for _ in range(self._config.optim.epochs):
            own: dict[str, SumCount] = {}
            logprobs = accumulate(
                self._execution,
                self.policy,
                prepared.schedule,
                prepared.coupling,
                prepared.loss,
                lambda given, source, start=start: self._batch_at(prepared, given, source, start),
                lambda metrics, own=own: _add(own, metrics),
            )
            _add(totals, self._over_ranks(own))
            start = logprobs if start is None else start
            if self._sharding is not None:
                self._sharding.reshard()  # the loss read nothing, so no backward pass did it
            norms.append(self.optimizer.step(rate, step + 1))
        assert start is not None
        return {
            **self._loss_figures(totals, prepared),
            **mismatch_figures(
                start, prepared.rollout_logprobs, prepared.batch.counted, self._config.off_policy
            ),
            "optim/grad_norm": sum(norms) / len(norms),
            "optim/lr": rate,
            **self._tree_figures(batch, prepared),
        }

    def nats_a_token(self, batch: StepBatch) -> float:
        """The mean of -log p over a batch's trained tokens, by the current weights. Every rank calls it."""
        schedule = self._execution.supported(self.policy, self._execution.schedule(batch.forest))
        logprobs, _ = self._execution.logprobs(self.policy, schedule)
        return -float(logprobs.double().sum()) / max(1, int(batch.forest.trained.sum()))

    def _prepare(self, batch: StepBatch) -> _Prepared:
        """Credit and normaliser over all tokens of the step, then all pruned to what the loss reads."""
        config, forest = self._config, batch.by_rollout
        credit = assign_credit(config.forest.credit, batch.forks, batch.advantages, batch.returns)
        weights = normalised_weights(
            credit.weights,
            forest.trained,
            forest.cu_seqlens,
            self._loss.normalisation,
            config.rollout.max_rollout_tokens,
        )
        needed = self._loss.tokens_read(forest, weights, credit.advantages, batch.pairs)
        gates = Gates(batch.gates, forest.cu_seqlens, batch.advantages, weights) if batch.gates else None
        if gates is not None:
            needed |= gates.reached(weights > 0)
            weights = gates.without_tags()
        pruned = prune(batch.forest, needed, keep_lengths=depends_on_length(self.policy.model))
        rollouts = np.searchsorted(pruned.source, forest.cu_seqlens)  # where they begin in what is left
        sampler = self._tensor(batch.rollout_logprobs[pruned.source])
        device = sampler.device
        loss = self._loss if gates is None else gates.loss(self._surrogate(), pruned.source, device)
        units = units_of(loss.couples, batch.pairs, forest.num_rollouts) if loss.coupled else None
        schedule, coupling = self._execution.schedule(pruned.forest, units, rollouts), None
        if units is not None:
            schedule = self._execution.supported(self.policy, schedule)
            coupling = coupling_of(schedule, units, rollouts, self._world)
        reference = None
        if self.reference is not None:
            with self.reference.selected():
                reference, _ = self._execution.logprobs(self.reference.policy, schedule)
        return _Prepared(
            pruned,
            schedule,
            coupling,
            LossBatch(
                old_logprobs=sampler,
                reference_logprobs=reference,
                advantages=self._tensor(credit.advantages[pruned.source]),
                weights=self._tensor(np.where(pruned.forest.trained, weights[pruned.source], 0.0)),
                cu_seqlens=torch.from_numpy(rollouts).to(device),
                pairs=torch.from_numpy(batch.pairs).to(device),
                preference=self._tensor(batch.preference),
            ),
            loss,
            sampler,
            int((weights > 0).sum()),
        )

    def _surrogate(self) -> SurrogateLoss:
        """The loss, which is a surrogate wherever a gate is contrasted: the configuration refuses others."""
        if not isinstance(self._loss, SurrogateLoss):
            raise TypeError(f"{type(self._loss).__name__} does not go with gate_contrast")
        return self._loss

    def _batch_at(
        self, prepared: _Prepared, own: Tensor, source: Tensor | None, start: Tensor | None
    ) -> LossBatch:
        """The batch of all tokens, or of those at `source`, whose log-probs the policy now gives as `own`.

        In the first epoch these are the start log-probs. Tokens with a non-finite log-prob do not count.
        """
        batch, sampler = prepared.batch, prepared.rollout_logprobs
        if source is not None:
            batch, sampler = batch.part(source), sampler[source]
            start = None if start is None else start[source]
        batch = replace(batch, old_logprobs=own if start is None else start)
        if self._config.off_policy.corrects:
            weight = importance(batch.old_logprobs, sampler, self._config.off_policy)
            batch = replace(batch, advantages=batch.advantages * weight)
        finite = torch.isfinite(own) & torch.isfinite(batch.old_logprobs) & torch.isfinite(sampler)
        if batch.reference_logprobs is not None:
            finite &= torch.isfinite(batch.reference_logprobs)
        return batch.without(~finite)

    def _over_ranks(self, own: Mapping[str, SumCount]) -> dict[str, SumCount]:
        """Each metric's sum over the ranks."""
        if self._world.size == 1:
            return dict(own)
        pairs: JsonValue = {name: list(pair) for name, pair in read_metrics(own).items()}
        totals: dict[str, SumCount] = {}
        for one in cast(list[dict[str, list[float]]], self._world.gather(pairs)):
            _add(totals, {name: SumCount(*pair) for name, pair in one.items()})
        return totals

    def _loss_figures(self, totals: Mapping[str, SumCount], prepared: _Prepared) -> dict[str, float]:
        """Means over tokens, the loss over epochs. A pruned token counts as one not clipped."""
        epochs, totals = self._config.optim.epochs, dict(totals)
        computed = float(prepared.pruned.forest.trained.sum())
        if "policy/clip_frac" in totals:
            totals["policy/clip_frac"] += SumCount(0.0, (prepared.counted_tokens - computed) * epochs)
        read = read_metrics(totals)
        figures = {name: total / count if count else total / epochs for name, (total, count) in read.items()}
        counted = read["policy/ratio"][1] if "policy/ratio" in read else 0.0
        return {**figures, "policy/dropped_tokens": computed * epochs - counted}

    def _tree_figures(self, batch: StepBatch, prepared: _Prepared) -> dict[str, float]:
        forest, pruned = batch.forest, prepared.pruned
        return {
            "tree/raw_tokens": float(forest.num_tokens),
            "tree/unique_tokens": float(forest.num_nodes),
            "tree/sharing": forest.num_tokens / max(1, forest.num_nodes),
            "tree/ideal_speedup": ideal_speedup(forest, self._shape),
            "tree/pruned_frac": pruned.pruned_frac,
            "tree/pruned_edge_frac": pruned.pruned_edge_frac,
            **self._execution.figures(),
            **({} if prepared.coupling is None else prepared.coupling.figures(prepared.schedule)),
        }

    def _tensor(self, values: np.ndarray) -> Tensor:
        """Per-token values beside log-probs: fp32, or fp64 for a fp64 policy."""
        model = self.policy.model
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        return torch.from_numpy(values).to(model.device, dtype)


def _add(totals: dict[str, SumCount], metrics: Mapping[str, SumCount]) -> None:
    for name, value in metrics.items():
        totals[name] = totals.get(name, SumCount(0.0, 0.0)) + value
