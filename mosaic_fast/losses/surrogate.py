"""Losses with a clipped ratio: GRPO and its normalisations, DAPO, GSPO, CISPO."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from mosaic_fast.losses.batch import Couples, Loss, LossBatch, Normalisation, SumCount

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mosaic_kernels import PackedForest

Ratio = Literal["token", "sequence", "detached"]


@dataclass(frozen=True)
class SurrogateLoss(Loss):
    """Sum of weights (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)), with KL and entropy terms.

    What r is, and what becomes of the clip, is the `ratio`:
        token     r = exp(policy - old) of the token
        sequence  r has the value of the geometric mean of the rollout's token ratios, and the gradient of the
                  token's own log-prob
        detached  -weights sg(clip(r)) A policy_logprobs with the token's r: no token loses its gradient to
                  the clip
    """

    ratio: Ratio = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    normalisation: Normalisation = "token"
    backend: str = "auto"

    @property
    def couples(self) -> Couples:
        return "rollout" if self.ratio == "sequence" else "token"

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    @property
    def takes_gates(self) -> bool:
        return self.ratio == "token"

    def tokens_read(
        self, forest: PackedForest, weights: np.ndarray, advantages: np.ndarray, pairs: np.ndarray
    ) -> np.ndarray:
        """With a KL or entropy term all that count; else those with an advantage, and their rollouts."""
        import numpy as np

        counted = weights > 0
        if self.kl_weight or self.entropy_weight:
            return counted
        pulled = counted & (advantages != 0)
        if self.ratio != "sequence":
            return pulled
        # The ratio of a rollout is made of all its tokens.
        rollout_of = np.repeat(np.arange(forest.num_rollouts), np.diff(forest.cu_seqlens))
        return counted & (np.bincount(rollout_of, pulled, forest.num_rollouts) > 0)[rollout_of]

    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """See `Loss`."""
        own = batch.token_metrics(policy_logprobs, entropy)
        if self.ratio == "sequence":
            # Against this denominator the ratio has the sequence's value and the token's gradient.
            fixed = policy_logprobs.detach()
            batch = replace(batch, old_logprobs=fixed - sequence_drift(fixed, batch))
        if self.ratio == "detached":
            main = self._detached(policy_logprobs, batch) + batch.kl_term(policy_logprobs, self.kl_weight)
        else:
            from mosaic_kernels import clipped_surrogate

            main = clipped_surrogate(
                policy_logprobs,
                batch.old_logprobs,
                batch.advantages,
                batch.weights,
                reference_logprobs=batch.reference_logprobs,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                kl_weight=self.kl_weight,
                backend=self.backend,
            ).sum()
        loss = main + batch.entropy_term(entropy, self.entropy_weight)
        clipped = self._clipped(policy_logprobs.detach(), batch)
        return loss, {
            **own,
            "policy/clip_frac": clipped,
            "policy/loss": SumCount(loss.detach().double(), 0.0),
        }

    def _detached(self, policy_logprobs: Tensor, batch: LossBatch) -> Tensor:
        ratio = (policy_logprobs.detach() - batch.old_logprobs).where(batch.counted, 0.0).exp()
        clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        coefficients = (clipped * batch.advantages).where(batch.counted, 0.0)
        return -batch.weighted_sum(coefficients * policy_logprobs)

    def _clipped(self, policy_logprobs: Tensor, batch: LossBatch) -> SumCount:
        """The tokens whose term the clip changes; under `detached`, whose gradient it changes."""
        ratio, advantages = (policy_logprobs - batch.old_logprobs).exp(), batch.advantages
        low, high = ratio < 1.0 - self.clip_low, ratio > 1.0 + self.clip_high
        if self.ratio == "detached":
            outside = (low | high) & (advantages != 0)
        else:
            outside = (low & (advantages < 0)) | (high & (advantages > 0))
        outside = outside & batch.counted
        return SumCount(outside.sum().double(), batch.counted.sum().double())


def sequence_drift(policy_logprobs: Tensor, batch: LossBatch) -> Tensor:
    """Log of GSPO's ratio: the mean of policy - old over the rollout's counted tokens. [T] -> [T]."""
    sums = batch.rollout_sums(policy_logprobs - batch.old_logprobs)
    counts = batch.rollout_sums(policy_logprobs.new_ones(len(policy_logprobs)))
    return (sums / counts.clamp(min=1.0))[batch.rollout_of]


@dataclass(frozen=True)
class GRPO(SurrogateLoss):
    """arXiv 2402.03300, equation 3."""

    ratio: Ratio = field(default="token", init=False)
    kl_weight: float = 0.01


@dataclass(frozen=True)
class DAPO(SurrogateLoss):
    """A higher clip above than below: arXiv 2503.14476, equation 8."""

    ratio: Ratio = field(default="token", init=False)
    clip_high: float = 0.28


@dataclass(frozen=True)
class DrGRPO(SurrogateLoss):
    """GRPO without what favours long rollouts and easy tasks: arXiv 2503.20783, section 3."""

    divide_by_std: ClassVar[bool] = False
    ratio: Ratio = field(default="token", init=False)
    normalisation: Normalisation = "constant"


@dataclass(frozen=True)
class GSPO(SurrogateLoss):
    """GSPO-token, arXiv 2507.18071, equations 13 and 14.

    It is GSPO, its equations 5 to 7, where a rollout's tokens have one advantage and one weight.
    """

    ratio: Ratio = field(default="sequence", init=False)
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    normalisation: Normalisation = "sequence"


@dataclass(frozen=True)
class CISPO(SurrogateLoss):
    """arXiv 2506.13585, equations 4 and 5; a clip_low of 1 never clips."""

    ratio: Ratio = field(default="detached", init=False)
    clip_low: float = 1.0
    clip_high: float = 4.0
