"""preference: the pairwise loss (DPO) of a judged group, forward and backward.

    preference       the loss from hidden states: forest_preference_loss against log-probs of every rollout's
                     trained tokens and pairwise_preference_loss. 6 rollouts of 250 trained tokens behind 750
                     shared ones, half of them forking halfway, all 15 pairs; hidden size 384, 8,192 tokens
    preference:step  the whole training step on the same rollouts through a Qwen3 model of 20 M parameters:
                     the forest against the padded flat batch; `trl` is the step of TRL's DPO trainer, for
                     which each pair is two rows

ideal of `preference` = trained rollout tokens / rows that some pair needs; of `preference:step` as of `step`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
import trl_peer
from contenders import check_gradients, check_same, gradients, padded_logprobs, with_steps
from measure import Result, compare
from torch import Tensor
from workloads import Workload, drawn, qwen3

from mosaic_fast.policy import Policy
from mosaic_kernels import (
    PackedForest,
    forest_preference_loss,
    ideal_speedup,
    linear_logprob,
    pairwise_preference_loss,
)
from mosaic_kernels.preference.tree import needed_edges

FORMULA = "ideal = trained rollout tokens / rows some pair needs; preference:step: as of step"

VARIANTS = ("preference", "preference:step")
DEFAULT = QUICK = ("preference",)

BETA, TOLERANCE = 0.1, 1e-4
_SHARED, _ROLLOUTS, _OWN = 750, 6, 250


def workload(name: str) -> Workload:
    model = qwen3() if name == "preference:step" else qwen3(1, 128, 8192)
    return drawn(_SHARED, _ROLLOUTS, _OWN, fork_halfway=True, model=model)


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
    if name == "preference:step":
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
        if trl_peer.installed() and not quick:
            pairs = all_pairs(forest.num_rollouts)
            peer = stack.enter_context(trl_peer.dpo(work, pairs, _reference_sums(forest), BETA))
            check_same("trl", peer.gradients(), gradients(work.model, backwards["flat"]))
            contenders["trl"] = peer.step
        return compare(
            contenders,
            repeats=2,
            ideal=ideal_speedup(forest, work.model.config),
            extra=extra,
            peaks=("ours", "flat"),
        )
