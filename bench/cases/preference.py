"""preference: the pairwise loss (DPO) of a judged group, forward and backward.

    preference       the loss from hidden states: forest_preference_loss against log-probs of every rollout's
                     trained tokens and pairwise_preference_loss. 6 rollouts of 250 trained tokens behind 750
                     shared ones, half of them forking halfway, all 15 pairs; hidden size 384, 8,192 tokens
    preference:step  the whole training step through a Qwen3 model of 3 M parameters: the forest against the
                     padded flat batch; `trl` is the step of TRL's DPO trainer, for which each pair is two
                     rows. 4 rollouts of 96 trained tokens behind 256 shared ones, all 6 pairs
    preference:step-large  the same with the rollouts of `preference` and a model of 20 M parameters

ideal of `preference` = trained rollout tokens / rows that some pair needs; of the others as of `step`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
import trl_peer
from contenders import check_gradients, gradients, padded_logprobs, with_steps
from measure import Result, compare
from torch import Tensor
from workloads import Workload, drawn, qwen3, small_qwen3

from cases.step import FORMULA as STEP_FORMULA
from mosaic_fast.policy import Policy
from mosaic_kernels import (
    PackedForest,
    forest_preference_loss,
    ideal_speedup,
    linear_logprob,
    pairwise_preference_loss,
)
from mosaic_kernels.preference.tree import needed_edges

_SHAPES = {  # shared tokens, rollouts, own tokens
    "preference": (750, 6, 250),
    "preference:step": (256, 4, 96),
    "preference:step-large": (750, 6, 250),
}
VARIANTS = tuple(_SHAPES)
DEFAULT, QUICK = ("preference", "preference:step"), ("preference",)
SECONDS = {"preference": 7, "preference:step": 20, "preference:step-large": 240}

BETA, TOLERANCE = 0.1, 1e-4


FORMULA = dict.fromkeys(VARIANTS, STEP_FORMULA)
FORMULA["preference"] = "ideal = trained rollout tokens / rows that some pair needs"


def workload(name: str) -> Workload:
    models = {"preference": lambda: qwen3(1, 128, 8192), "preference:step": small_qwen3}
    shared, rollouts, own = _SHAPES[name]
    return drawn(shared, rollouts, own, fork_halfway=True, model=models.get(name, qwen3)())


def all_pairs(rollouts: int) -> np.ndarray:  # [P, 2]
    return np.stack(np.triu_indices(rollouts, 1), axis=1)


def ideal(forest: PackedForest) -> float:
    needed = needed_edges(forest, all_pairs(forest.num_rollouts))
    return int(forest.trained.sum()) / len(needed.rows)


Loss = Callable[[Tensor, Tensor], Tensor]


def losses(forest: PackedForest) -> dict[str, Loss]:
    """From hidden [U, D] and weight [V, D] to the mean loss over all pairs, the first of a pair better."""
    pairs = all_pairs(forest.num_rollouts)
    better = torch.ones(len(pairs))
    trained = np.flatnonzero(forest.trained)
    predicted_at = torch.from_numpy(forest.parent[forest.node_index[trained]])
    targets = torch.from_numpy(forest.tokens[forest.node_index[trained]])
    places = torch.from_numpy(trained)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return forest_preference_loss(hidden, weight, forest, pairs, better, beta=BETA).mean()

    def flat(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs = linear_logprob(hidden[predicted_at], weight, targets)
        spread = logprobs.new_zeros(forest.num_tokens).index_copy(0, places, logprobs)
        return pairwise_preference_loss(
            spread, None, forest.trained, forest.cu_seqlens, pairs, better, beta=BETA
        ).mean()

    return {"ours": ours, "flat": flat}


def _inputs(forest: PackedForest) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(forest.num_nodes, 384, generator=random).requires_grad_(),
        (torch.randn(8192, 384, generator=random) / 20).requires_grad_(),
    ]


def step_backwards(work: Workload) -> dict[str, Callable[[], None]]:
    """Backward passes of the mean loss over all pairs through the whole model."""
    forest, policy = work.forest, Policy(work.model)
    pairs, reference = all_pairs(forest.num_rollouts), reference_logprobs(forest)
    better = torch.ones(len(pairs))

    def loss(logprobs: Tensor) -> Tensor:  # [T]
        return pairwise_preference_loss(
            logprobs, reference, forest.trained, forest.cu_seqlens, pairs, better, beta=BETA
        ).mean()

    return {
        "ours": lambda: loss(policy.logprobs(work.forest)).backward(),
        "flat": lambda: loss(padded_logprobs(work)).backward(),
    }


def reference_logprobs(forest: PackedForest) -> Tensor:  # [T]
    """Random, near those of a random model."""
    random = torch.Generator().manual_seed(2)
    return -9.0 + 0.1 * torch.randn(forest.num_tokens, generator=random)


def _reference_sums(forest: PackedForest) -> np.ndarray:  # [R]
    counted = np.where(forest.trained, reference_logprobs(forest).numpy(), 0.0)
    return np.add.reduceat(counted, forest.cu_seqlens[:-1])


def check(name: str, quick: bool) -> None:
    """Loss and gradients of both, fp32, 1e-4 of the largest value (of each gradient's norm)."""
    work = workload(name)
    if name != "preference":
        check_gradients(work.model, step_backwards(work))
        return
    results = {}
    for one, loss in losses(work.forest).items():
        leaves = _inputs(work.forest)
        value = loss(*leaves)
        results[one] = [value, *torch.autograd.grad(value, leaves)]
    for what, a, b in zip(("loss", "d hidden", "d weight"), results["ours"], results["flat"], strict=True):
        error = float(((a - b).abs().max() / b.abs().max()).detach())
        assert error < TOLERANCE, f"ours: {what} is off by {error:.1e}"


def run(name: str, quick: bool) -> Result:
    work = workload(name)
    forest = work.forest
    extra = {
        "raw_tokens": forest.num_tokens,
        "unique_tokens": forest.num_nodes,
        "pairs": len(all_pairs(forest.num_rollouts)),
    }
    if name == "preference":
        leaves = _inputs(forest)
        needed = needed_edges(forest, all_pairs(forest.num_rollouts))
        return compare(
            {
                one: lambda loss=loss: torch.autograd.grad(loss(*leaves), leaves)
                for one, loss in losses(forest).items()
            },
            repeats=5,
            ideal=ideal(forest),
            extra={**extra, "gflop": 6e-9 * len(needed.rows) * 384 * 8192},
            peaks=("ours", "flat"),
        )
    backwards = step_backwards(work)
    contenders = with_steps(work.model, backwards)
    with ExitStack() as stack:
        not_run: dict[str, str] = {}
        if not quick:
            trl = trl_peer.dpo(work, all_pairs(forest.num_rollouts), _reference_sums(forest), BETA)
            not_run = trl_peer.join(contenders, stack, trl, gradients(work.model, backwards["ours"]))
        return compare(
            contenders,
            repeats=5,
            budget_s=8.0,
            ideal=ideal_speedup(forest, work.model.config),
            extra=extra,
            peaks=("ours", "flat"),
            warm=False,
            not_run=not_run,
        )
