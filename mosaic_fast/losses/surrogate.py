"""Losses with a clipped ratio: GRPO and its normalisations, DAPO, GSPO, CISPO."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mosaic_fast.losses.batch import (
    LossBatch,
    SumCount,
    entropy_term,
    kl_term,
    rollout_of,
    rollout_sums,
    token_metrics,
    weighted_sum,
)
from mosaic_kernels import clipped_surrogate


@dataclass(frozen=True)
class SurrogateLoss:
    """Sum of weights (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)), with KL and entropy terms.

    What r is, and what becomes of the clip, is the `ratio`:
        token     r = exp(policy - start) of the token. GRPO, arXiv 2402.03300, equation 3; with clip_high
                  above clip_low DAPO, arXiv 2503.14476, equation 8; with `constant` weights Dr. GRPO,
                  arXiv 2503.20783, section 3.
        sequence  r has the value of the geometric mean of the rollout's token ratios, and the gradient of the
                  token's own log-prob: GSPO-token, arXiv 2507.18071, equations 13 and 14. It is GSPO, its
                  equations 5 to 7, where a rollout's tokens have one advantage and one weight.
        detached  -weights sg(clip(r)) A policy_logprobs with the token's r: no token loses its gradient to
                  the clip. CISPO, arXiv 2506.13585, equations 4 and 5.
    """

    ratio: Literal["token", "sequence", "detached"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    entropy_weight: float = 0.0

    @property
    def coupled(self) -> bool:
        return self.ratio == "sequence"

    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """See `Loss`."""
        own = token_metrics(policy_logprobs, batch, entropy)
        if self.ratio == "sequence":
            # Against this denominator the ratio has the sequence's value and the token's gradient.
            fixed = policy_logprobs.detach()
            batch = replace(batch, old_logprobs=fixed - sequence_drift(fixed, batch))
        if self.ratio == "detached":
            main = self._detached(policy_logprobs, batch) + kl_term(policy_logprobs, batch, self.kl_weight)
        else:
            main = clipped_surrogate(
                policy_logprobs,
                batch.old_logprobs,
                batch.advantages,
                batch.weights,
                reference_logprobs=batch.reference_logprobs,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                kl_weight=self.kl_weight,
            ).sum()
        loss = main + entropy_term(entropy, batch, self.entropy_weight)
        clipped = self._clipped(policy_logprobs.detach(), batch)
        return loss, {**own, "policy/clip_frac": clipped, "policy/loss": SumCount(float(loss.detach()), 0.0)}

    def _detached(self, policy_logprobs: Tensor, batch: LossBatch) -> Tensor:
        ratio = torch.exp(torch.where(batch.counted, policy_logprobs.detach() - batch.old_logprobs, 0.0))
        clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        coefficients = torch.where(batch.counted, clipped * batch.advantages, 0.0)
        return -weighted_sum(coefficients * policy_logprobs, batch.weights)

    def _clipped(self, policy_logprobs: Tensor, batch: LossBatch) -> SumCount:
        """The tokens whose term the clip changes; under `detached`, whose gradient it changes."""
        counted = batch.counted
        ratio = torch.exp(policy_logprobs[counted] - batch.old_logprobs[counted])
        advantages = batch.advantages[counted]
        low, high = ratio < 1.0 - self.clip_low, ratio > 1.0 + self.clip_high
        if self.ratio == "detached":
            outside = (low | high) & (advantages != 0)
        else:
            outside = (low & (advantages < 0)) | (high & (advantages > 0))
        return SumCount(float(outside.sum()), float(len(ratio)))


def sequence_drift(policy_logprobs: Tensor, batch: LossBatch) -> Tensor:
    """Log of GSPO's ratio: the mean of policy - start over the rollout's counted tokens. [T] -> [T]."""
    assert batch.cu_seqlens is not None, "a coupled loss is given the whole step"
    sums = rollout_sums(policy_logprobs - batch.old_logprobs, batch)
    counts = rollout_sums(torch.ones_like(policy_logprobs), batch)
    return (sums / counts.clamp(min=1.0))[rollout_of(batch.cu_seqlens)]
