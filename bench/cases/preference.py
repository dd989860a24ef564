"""preference: the pairwise loss (DPO) of a judged group, forward and backward.

    preference       the loss from hidden states: forest_preference_loss against log-probs of every rollout's
                     trained tokens and pairwise_preference_loss. 6 rollouts of 250 trained tokens behind 750
                     shared ones, half of them forking halfway, all 15 pairs; hidden size 384, 8,192 tokens
    preference:step  the trainer's own update for dpo through a Qwen3 model of 3 M parameters, from packing
                     and pruning on, against the padded flat batch. 4 rollouts of 96 trained tokens behind
                     256 shared ones, all 6 pairs
    preference:step-large  the same with the rollouts of `preference` and a model of 20 M parameters

On CUDA: 8 rollouts of 512 behind 2,048, hidden size 2,048, 151,936 tokens; in the steps 4 rollouts of 512
behind 1,536 through a model of the shape of Qwen3-0.6B, of Qwen3-1.7B in step-large.

    flash_pref  flash-pref's shared prefix, all rollouts one group: what all share is computed once
    trl         CPU: the step of TRL's DPO trainer, for which each pair is two rows

ideal of `preference` = trained rollout tokens / rows that some pair needs; of the others as of `step`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import flash_pref_peer
import numpy as np
import peer
import torch
import trl_peer
from agreement import Expected, Missing
from contenders import expected_gradients, gradients, padded_logprobs, with_steps
from device import Place
from measure import Result, compare
from torch import Tensor
from workloads import (
    QWEN3_0_6B,
    QWEN3_1_7B,
    Workload,
    drawn,
    drawn_rollouts,
    qwen3,
    real_qwen3,
    small_qwen3,
)

from cases.step import FORMULA as STEP_FORMULA
from mosaic_fast.learner.accumulate import accumulate
from mosaic_fast.learner.execution import Execution, coupling_of, units_of
from mosaic_fast.learner.step_batch import prune
from mosaic_fast.losses import LossBatch
from mosaic_fast.losses.pairwise import DPO
from mosaic_fast.policy import Policy
from mosaic_kernels import (
    PackedForest,
    forest_preference_loss,
    ideal_speedup,
    linear_logprob,
    pack_forest,
    pairwise_preference_loss,
)
from mosaic_kernels.preference.reference import needed_edges

SHAPES = {  # shared tokens, rollouts, own tokens
    "preference": (750, 6, 250),
    "preference:step": (256, 4, 96),
    "preference:step-large": (750, 6, 250),
}
REAL_SHAPES = {
    "preference": (2_048, 8, 512),
    "preference:step": (1_536, 4, 512),
    "preference:step-large": (1_536, 4, 512),
}
# Hidden size and vocabulary of `preference`.
HEAD: tuple[int, int] = (384, 8_192)
REAL_HEAD: tuple[int, int] = (2_048, 151_936)
VARIANTS = tuple(SHAPES)
ON_CPU = False
DEFAULT, QUICK = ("preference", "preference:step"), ("preference",)
SECONDS = {"preference": 7, "preference:step": 20, "preference:step-large": 240}

BETA = 0.1


FORMULA = dict.fromkeys(VARIANTS, STEP_FORMULA)
FORMULA["preference"] = "ideal = trained rollout tokens / rows that some pair needs"


def forest_of(place: Place) -> PackedForest:
    """The rollouts of `preference`."""
    shared, rollouts, own = (REAL_SHAPES if place.real else SHAPES)["preference"]
    vocabulary = (REAL_HEAD if place.real else HEAD)[1]
    return pack_forest(*drawn_rollouts(vocabulary, shared, rollouts, own, fork_halfway=True))


def workload(name: str, place: Place) -> Workload:
    """The rollouts and the model of a variant that is a whole step."""
    shared, rollouts, own = (REAL_SHAPES if place.real else SHAPES)[name]
    large = name == "preference:step-large"
    if place.real:
        model = real_qwen3(place, QWEN3_1_7B if large else QWEN3_0_6B)
    else:
        model = qwen3() if large else small_qwen3()
    return drawn(shared, rollouts, own, fork_halfway=True, model=model)


def all_pairs(rollouts: int) -> np.ndarray:  # [P, 2]
    return np.stack(np.triu_indices(rollouts, 1), axis=1)


def ideal(forest: PackedForest) -> float:
    needed = needed_edges(forest, all_pairs(forest.num_rollouts))
    return int(forest.trained.sum()) / len(needed.rows)


Loss = Callable[[Tensor, Tensor], Tensor]


def losses(forest: PackedForest, device: torch.device) -> dict[str, Loss]:
    """From hidden [U, D] and weight [V, D] to the mean loss over all pairs, the first of a pair better."""
    pairs = all_pairs(forest.num_rollouts)
    better = torch.ones(len(pairs), device=device)
    trained = np.flatnonzero(forest.trained)
    predicted_at = torch.from_numpy(forest.parent[forest.node_index[trained]]).to(device)
    targets = torch.from_numpy(forest.tokens[forest.node_index[trained]]).to(device)
    places = torch.from_numpy(trained).to(device)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return forest_preference_loss(hidden, weight, forest, pairs, better, beta=BETA).mean()

    def flat(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs = linear_logprob(hidden[predicted_at], weight, targets)
        spread = logprobs.new_zeros(forest.num_tokens).index_copy(0, places, logprobs)
        return pairwise_preference_loss(
            spread, None, forest.trained, forest.cu_seqlens, pairs, better, beta=BETA
        ).mean()

    return {"ours": ours, "flat": flat}


def _inputs(forest: PackedForest, place: Place) -> list[Tensor]:
    size, vocabulary = REAL_HEAD if place.real else HEAD
    hidden = place.randn(forest.num_nodes, size, seed=0)
    weight = place.randn(vocabulary, size, seed=1).div_(size**0.5)
    return [hidden.requires_grad_(), weight.requires_grad_()]


StepLoss = Callable[[Workload], Tensor]


def step_loss(forest: PackedForest) -> StepLoss:
    """The mean loss over all pairs through the whole model, from one padded row a rollout."""
    pairs, reference = all_pairs(forest.num_rollouts), reference_logprobs(forest)

    def loss(work: Workload) -> Tensor:
        logprobs = padded_logprobs(work)
        better = torch.ones(len(pairs), device=logprobs.device)
        return pairwise_preference_loss(
            logprobs,
            reference.to(logprobs.device),
            forest.trained,
            forest.cu_seqlens,
            pairs,
            better,
            beta=BETA,
        ).mean()

    return loss


def trainers_update(work: Workload) -> None:
    """The gradient of the same loss as `Learner.update` adds it up, from packing and pruning on."""
    device, forest = work.model.device, work.forest
    pairs, loss = all_pairs(forest.num_rollouts), DPO(beta=BETA)
    weights = forest.trained / max(1, int(forest.trained.sum()))
    needed = loss.tokens_read(forest, weights, np.ones(len(weights)), pairs)
    pruned = prune(forest, needed)
    units = units_of(loss.couples, pairs, forest.num_rollouts)
    execution = Execution(work.tokens_per_microbatch, 1.0, work.model.config)
    schedule = execution.schedule(pruned.forest, units)
    policy, reference = Policy(work.model), reference_logprobs(forest)[pruned.source].to(device)
    counted = torch.from_numpy(np.where(pruned.forest.trained, weights[pruned.source], 0.0))
    batch = LossBatch(
        old_logprobs=torch.zeros_like(reference),
        reference_logprobs=reference,
        advantages=torch.ones_like(reference),
        weights=counted.to(reference),
        cu_seqlens=torch.from_numpy(pruned.forest.cu_seqlens).to(device),
        pairs=torch.from_numpy(pairs).to(device),
        preference=torch.ones(len(pairs), device=device),
    )

    def batch_at(own: Tensor, source: Tensor | None) -> LossBatch:
        return replace(batch, old_logprobs=own) if source is None else batch.part(source)

    coupling = coupling_of(schedule, units)
    accumulate(execution, policy, schedule, coupling, loss, batch_at, lambda metrics: None)


def step_backwards(work: Workload) -> dict[str, Callable[[], None]]:
    flat = step_loss(work.forest)
    return {"ours": lambda: trainers_update(work), "flat": lambda: flat(work).backward()}


def reference_logprobs(forest: PackedForest) -> Tensor:  # [T]
    """Random reference log-probs, near those of a random model."""
    random = torch.Generator().manual_seed(2)
    return -9.0 + 0.1 * torch.randn(forest.num_tokens, generator=random)


def _reference_sums(forest: PackedForest) -> np.ndarray:  # [R]
    counted = np.where(forest.trained, reference_logprobs(forest).numpy(), 0.0)
    return np.add.reduceat(counted, forest.cu_seqlens[:-1])


def check(name: str, quick: bool, place: Place) -> Missing:
    """Loss and gradients of both (bench/agreement.py)."""
    if name != "preference":
        work = workload(name, place)
        backwards = step_backwards(work)
        expected_of_step(work).check("ours", gradients(work.model, backwards["ours"]))
        return {}
    forest = forest_of(place)
    of = losses(forest, place.device)
    leaves = _inputs(forest, place)

    def results(one: str, leaves: list[Tensor]) -> dict[str, Tensor]:
        value = of[one](*leaves)
        return dict(zip(_RESULTS, (value, *torch.autograd.grad(value, leaves)), strict=True))

    plain = results("flat", leaves)
    if place.dtype == torch.float32:
        expected = Expected(plain)
    else:
        exact = results("flat", [x.detach().double().requires_grad_() for x in leaves])
        expected = Expected(exact, plain)
    expected.check("ours", results("ours", leaves))
    return {}


_RESULTS = ("loss", "d hidden", "d weight")


def expected_of_step(work: Workload) -> Expected:
    return expected_gradients(work, step_backwards(work)["flat"], step_loss(work.forest))


def run(name: str, quick: bool, place: Place, missing: Missing) -> Result:
    return _run_loss(place) if name == "preference" else _run_step(workload(name, place), quick, place)


def _figures(forest: PackedForest) -> dict[str, float]:
    return {
        "raw_tokens": forest.num_tokens,
        "unique_tokens": forest.num_nodes,
        "pairs": len(all_pairs(forest.num_rollouts)),
    }


def _run_loss(place: Place) -> Result:
    forest = forest_of(place)
    leaves = _inputs(forest, place)
    needed = needed_edges(forest, all_pairs(forest.num_rollouts))
    size, vocabulary = REAL_HEAD if place.real else HEAD
    return compare(
        {
            one: lambda loss=loss: torch.autograd.grad(loss(*leaves), leaves)
            for one, loss in losses(forest, place.device).items()
        },
        repeats=20 if place.real else 5,
        budget_s=8.0,
        ideal=ideal(forest),
        extra={**_figures(forest), "gflop": 6e-9 * len(needed.rows) * size * vocabulary},
        peaks=("ours", "flat"),
        place=place,
    )


def _run_step(work: Workload, quick: bool, place: Place) -> Result:
    forest = work.forest
    pairs, reference = all_pairs(forest.num_rollouts), _reference_sums(forest)
    backwards = step_backwards(work)
    contenders = with_steps(work.model, backwards)
    missing: Missing = {}
    with ExitStack() as stack:
        if not quick and not place.real:
            trl = trl_peer.dpo(work, pairs, reference, BETA)
            expected = Expected(gradients(work.model, backwards["ours"]))
            missing |= trl_peer.join(contenders, stack, trl, expected)
        if not quick and flash_pref_peer.installed():
            shared = flash_pref_peer.pairwise(work, pairs, reference, BETA)
            missing |= peer.join("flash_pref", contenders, stack, shared, expected_of_step(work))
        return compare(
            contenders,
            repeats=5,
            budget_s=8.0,
            ideal=ideal_speedup(forest, work.model.config),
            extra=_figures(forest),
            peaks=("ours", "flat"),
            warm=False,
            not_run=missing,
            place=place,
        )
