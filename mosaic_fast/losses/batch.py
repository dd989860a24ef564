"""The contract of a loss: what it reads, what it gives.

From credit to the weights of a loss: what the sum over tokens is divided by.

What several losses share: sums over the tokens that count, and the terms beside the main one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SumCount:
    """A metric until the sink: a sum over `count` things, so that parts can be added."""

    sum: float
    count: float

    def __add__(self, other: SumCount) -> SumCount:
        return SumCount(self.sum + other.sum, self.count + other.count)

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0


@dataclass(frozen=True)
class LossBatch:
    """What a loss reads beside the policy's log-probs, for N rollout tokens in flat order.

    Coupled losses are given the whole step; the others may be given any part of it (`part`).

    Two rollouts of [prompt, token, token] under `token` normalisation:
        cu_seqlens [0, 3, 6]   weights [0, 1/4, 1/4,  0, 1/4, 1/4]   pairs [[0, 1]]   preference [1.0]
    """

    old_logprobs: Tensor  # [N] the policy's own at the step's start: denominator of the clipped ratio
    reference_logprobs: Tensor | None  # [N] of the frozen reference policy
    advantages: Tensor  # [N] times the off-policy weight, if there is one
    weights: Tensor  # [N] >= 0: credit over the normaliser of the whole step; 0: the token does not count
    cu_seqlens: Tensor | None = None  # [R+1] int64, where rollouts begin; None in a part
    pairs: Tensor | None = None  # [P, 2] int64, judged pairs of rollouts; None in a part
    preference: Tensor | None = None  # [P] in [0, 1]: 1 if the first of the pair is better, 0.5 for a tie

    @property
    def counted(self) -> Tensor:  # [N] bool
        return self.weights > 0

    def part(self, source: Tensor) -> LossBatch:
        """The tokens at `source` [n] int64."""
        reference = self.reference_logprobs
        return LossBatch(
            self.old_logprobs[source],
            None if reference is None else reference[source],
            self.advantages[source],
            self.weights[source],
        )

    def without(self, dropped: Tensor) -> LossBatch:
        """The batch in which the tokens where `dropped` [N] is True do not count."""
        return replace(self, weights=torch.where(dropped, 0.0, self.weights))


class Loss(Protocol):
    """A pure function of log-probs. Adding up the parts of a loss that is not coupled gives the whole."""

    @property
    def coupled(self) -> bool:
        """True if a token's gradient depends on other tokens' log-probs: then it wants the whole step."""
        ...

    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """Scalar loss, and metrics as sums and counts. policy_logprobs and entropy: [N], differentiable."""
        ...


Normalisation = Literal["token", "sequence", "constant"]


def normalised_weights(
    credit: np.ndarray,  # [T] float64 >= 0, from `assign_credit`
    trained: np.ndarray,  # [T] bool
    cu_seqlens: np.ndarray,  # [R+1] int64
    normalisation: Normalisation,
    constant: float,
) -> np.ndarray:  # [T] float64
    """Credit of the trained tokens over the step's normaliser; 0 where not trained.

        token     the sum of the credit: every token of the step counts alike (DAPO, arXiv 2503.14476)
        sequence  the sum of the rollout's credit, times the rollouts that have any: every rollout counts
                  alike (GRPO, arXiv 2402.03300, equation 3; GSPO)
        constant  `constant` tokens for every rollout that has any: no rollout's length matters (Dr. GRPO,
                  arXiv 2503.20783, section 3.1)

    Example: two rollouts with 1 and 3 trained tokens. token: 1/4 each; sequence: 1/2, then 1/6 each;
    constant 10: 1/20 each.
    """
    weights = np.where(trained, credit, 0.0)
    if normalisation == "token":
        return weights / (weights.sum() or 1.0)
    rollout_of = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    sums = np.bincount(rollout_of, weights=weights, minlength=len(cu_seqlens) - 1)
    rollouts = max(1, int((sums > 0).sum()))
    if normalisation == "constant":
        return weights / (constant * rollouts)
    return weights / (np.where(sums > 0, sums, 1.0)[rollout_of] * rollouts)


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
    ratio = torch.exp(policy - batch.old_logprobs[counted])
    metrics = {"policy/ratio": SumCount(float(ratio.sum()), count)}
    if entropy is not None:
        metrics["policy/entropy"] = SumCount(float(entropy[counted].sum()), count)
    if batch.reference_logprobs is not None:
        difference = batch.reference_logprobs[counted] - policy
        metrics["policy/kl"] = SumCount(float((torch.expm1(difference) - difference).sum()), count)
    return metrics
