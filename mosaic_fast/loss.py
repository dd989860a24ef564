"""Policy losses: pure functions of log-probs, one value a rollout token.

A loss is a sum over trained tokens over a count known before the first micro-batch, so that a micro-batch may
be any part of the step's tokens: the parts' losses and gradients add up to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossBatch:
    """What a loss needs beside the policy's log-probs, for T rollout tokens of one micro-batch."""

    start_logprobs: Tensor  # [T] the policy's own at the step's start: denominator of the clipped ratio
    reference_logprobs: Tensor | None  # [T] of the frozen reference policy
    advantages: Tensor  # [T] its rollout's advantage
    mask: Tensor  # [T] bool, trained and finite
    total_tokens: float  # trained tokens of the whole step, over all micro-batches


@dataclass(frozen=True)
class SumCount:
    """A metric until the sink: a sum over `count` tokens, so that parts can be added."""

    sum: float
    count: float

    def __add__(self, other: SumCount) -> SumCount:
        return SumCount(self.sum + other.sum, self.count + other.count)

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0


@dataclass(frozen=True)
class GRPOLoss:
    """GRPO with token normalisation: PPO's clipped surrogate and a k3 estimate of the KL divergence.

    Per trained token, with r = exp(policy - start) and d = reference - policy:
        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight (exp(d) - d - 1)
    summed and divided by total_tokens. GRPO: arXiv 2402.03300, equation 3; k3: its equation 4; asymmetric
    clipping: DAPO, arXiv 2503.14476.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0

    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """Scalar loss of this micro-batch's part, and metrics as sums and counts.

        policy_logprobs, entropy: [T]; both differentiable; entropy is only reported.
        """
        mask = batch.mask
        policy, start, advantages = policy_logprobs[mask], batch.start_logprobs[mask], batch.advantages[mask]
        ratio = torch.exp(policy - start)
        clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        terms = -torch.minimum(ratio * advantages, clipped * advantages)
        count = float(mask.sum())
        with torch.no_grad():
            outside = ((ratio < 1.0 - self.clip_low) & (advantages < 0)) | (
                (ratio > 1.0 + self.clip_high) & (advantages > 0)
            )
            metrics = {
                "policy/ratio": SumCount(float(ratio.sum()), count),
                "policy/clip_frac": SumCount(float(outside.sum()), count),
            }
            if entropy is not None:
                metrics["policy/entropy"] = SumCount(float(entropy[mask].sum()), count)
        if batch.reference_logprobs is not None:
            difference = batch.reference_logprobs[mask] - policy
            kl = torch.expm1(difference) - difference
            terms = terms + self.kl_weight * kl
            metrics["policy/kl"] = SumCount(float(kl.detach().sum()), count)
        loss = terms.sum() / batch.total_tokens
        metrics["policy/loss"] = SumCount(float(loss.detach()), 0.0)
        return loss, metrics
