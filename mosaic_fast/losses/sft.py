"""Supervised learning: the cross-entropy of the tokens that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mosaic_fast.losses.batch import Couples, Loss, LossBatch, Normalisation, SumCount

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SFT(Loss):
    """Sum of weights times -log p, with KL and entropy terms.

    The weights are those of `normalisation`: `token` is the mean over the step's trained tokens, as PyTorch's
    cross-entropy has it; `sequence` the mean of each conversation's mean.
    """

    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    normalisation: Normalisation = "token"
    backend: str = "auto"

    @property
    def couples(self) -> Couples:
        return "token"

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """See `Loss`."""
        value = (
            batch.weighted_sum(-policy_logprobs)
            + batch.kl_term(policy_logprobs, self.kl_weight)
            + batch.entropy_term(entropy, self.entropy_weight)
        )
        counted, own = batch.counted, policy_logprobs.detach()
        nll = SumCount(-own.where(counted, 0.0).sum().double(), counted.sum().double())
        loss = SumCount(value.detach().double(), 0.0)
        return value, {**batch.token_metrics(own, entropy), "policy/nll": nll, "policy/loss": loss}
