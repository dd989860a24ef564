"""Losses on judged pairs of rollouts, without rewards or advantages: Bradley-Terry (DPO) and IPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mosaic_fast.losses.batch import (
    LossBatch,
    SumCount,
    entropy_term,
    rollout_of,
    rollout_sums,
    token_metrics,
)
from mosaic_kernels import pairwise_preference_loss


@dataclass(frozen=True)
class PairwiseLoss:
    """Mean over the step's judged pairs (i, j), each with p in [0, 1]: how surely i is the better one.

    With h = (s_i - s_j) - (r_i - r_j), s and r the sums of the policy's and the reference's log-probs over a
    rollout's counted tokens; a tie is p = 0.5:
        dpo       -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h): Bradley-Terry, DPO,
                  arXiv 2305.18290, equation 7, with soft labels
        dpo_norm  the same, each sum divided by its number of tokens: length-normalised DPO,
                  arXiv 2411.15124 (Tulu 3), equation 6
        ipo       p (h - 1/(2 beta))^2 + (1 - p) (h + 1/(2 beta))^2: IPO, arXiv 2310.12036, equation 17, its
                  tau called beta, in expectation over a label of probability p
    """

    kind: Literal["dpo", "dpo_norm", "ipo"] = "dpo"
    beta: float = 0.1
    entropy_weight: float = 0.0

    @property
    def coupled(self) -> bool:
        return True

    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """See `Loss`."""
        reference, cu_seqlens, pairs = batch.reference_logprobs, batch.cu_seqlens, batch.pairs
        if reference is None or cu_seqlens is None or pairs is None or batch.preference is None:
            raise ValueError(f"{self.kind} needs the whole step with judged pairs and a reference policy")
        preference = batch.preference.to(policy_logprobs.dtype)
        policy = policy_logprobs
        if self.kind == "dpo_norm":
            lengths = rollout_sums(torch.ones_like(policy), batch).clamp(min=1.0)[rollout_of(cu_seqlens)]
            policy, reference = policy / lengths, reference / lengths
        margins = rollout_sums(policy - reference, batch)
        h = margins[pairs[:, 0]] - margins[pairs[:, 1]]
        if self.kind == "ipo":
            target = 1.0 / (2.0 * self.beta)
            losses = preference * (h - target) ** 2 + (1.0 - preference) * (h + target) ** 2
        else:
            losses = pairwise_preference_loss(
                policy, reference, batch.counted, cu_seqlens, pairs, preference, beta=self.beta
            )
        count = float(len(preference))
        loss = losses.sum() / max(1.0, count) + entropy_term(entropy, batch, self.entropy_weight)
        with torch.no_grad():
            decided = preference != 0.5
            agrees = ((h > 0) == (preference > 0.5)) & decided
            margin = (h * (2.0 * preference - 1.0)).sum()
        return loss, {
            **token_metrics(policy_logprobs, batch, entropy),
            "policy/pair_accuracy": SumCount(float(agrees.sum()), float(decided.sum())),
            "policy/pair_margin": SumCount(float(margin), count),
            "policy/loss": SumCount(float(loss.detach()), 0.0),
        }
