"""What several losses share: sums over the tokens that count, and the terms beside the main one."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_fast.loss.batch import LossBatch, SumCount


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """sum of weights * values, where a value of weight 0 may be anything, even NaN. [N], [N] -> scalar."""
    return (weights * torch.where(weights > 0, values, 0.0)).sum()


def rollout_sums(values: Tensor, batch: LossBatch) -> Tensor:
    """Sum of values [T] over the counted tokens of each rollout [R]; other values may be anything."""
    assert batch.cu_seqlens is not None, "a coupled loss is given the whole step"
    kept = torch.where(batch.counted, values, 0.0)
    return kept.new_zeros(len(batch.cu_seqlens) - 1).index_add(0, rollout_of(batch.cu_seqlens), kept)


def rollout_of(cu_seqlens: Tensor) -> Tensor:
    """The rollout of each token: [R+1] -> [T] int64."""
    rollouts = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(rollouts, cu_seqlens.diff())


def kl_term(policy_logprobs: Tensor, batch: LossBatch, kl_weight: float) -> Tensor:
    """kl_weight times the weighted sum of k3 = exp(d) - d - 1, d = reference - policy.

    The estimate of KL(policy || reference) of GRPO, arXiv 2402.03300, equation 4.
    """
    if not kl_weight or batch.reference_logprobs is None:
        return policy_logprobs.new_zeros(())
    difference = torch.where(batch.counted, batch.reference_logprobs - policy_logprobs, 0.0)
    return kl_weight * weighted_sum(torch.expm1(difference) - difference, batch.weights)


def entropy_term(entropy: Tensor | None, batch: LossBatch, entropy_weight: float) -> Tensor:
    """Minus entropy_weight times the weighted sum of entropies [N]: a bonus for staying undecided."""
    if not entropy_weight:
        return batch.weights.new_zeros(())
    if entropy is None:
        raise ValueError("entropy_weight above 0 needs entropy [N]")
    return -entropy_weight * weighted_sum(entropy, batch.weights)


@torch.no_grad()
def token_metrics(policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> dict[str, SumCount]:
    """Ratio, KL and entropy: plain sums over the counted tokens."""
    counted = batch.counted
    policy, count = policy_logprobs[counted], float(counted.sum())
    ratio = torch.exp(policy - batch.start_logprobs[counted])
    metrics = {"policy/ratio": SumCount(float(ratio.sum()), count)}
    if entropy is not None:
        metrics["policy/entropy"] = SumCount(float(entropy[counted].sum()), count)
    if batch.reference_logprobs is not None:
        difference = batch.reference_logprobs[counted] - policy
        metrics["policy/kl"] = SumCount(float((torch.expm1(difference) - difference).sum()), count)
    return metrics
