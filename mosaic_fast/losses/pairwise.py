"""Losses on judged pairs of rollouts, without rewards or advantages: Bradley-Terry (DPO) and IPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from mosaic_fast.losses.batch import Couples, Loss, LossBatch, SumCount

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mosaic_kernels import PackedForest

Kind = Literal["dpo", "dpo_norm", "ipo"]


@dataclass(frozen=True)
class PairwiseLoss(Loss):
    """Mean over the step's judged pairs (i, j), each with p in [0, 1]: how surely i is the better one.

    With h = (s_i - s_j) - (r_i - r_j), s and r the sums of the policy's and the reference's log-probs over a
    rollout's counted tokens; a tie is p = 0.5:
        dpo       -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h)
        dpo_norm  the same, each sum divided by its number of tokens
        ipo       p (h - 1/(2 beta))^2 + (1 - p) (h + 1/(2 beta))^2
    """

    pairwise: ClassVar[bool] = True
    kind: Kind = "dpo"
    beta: float = 0.1
    entropy_weight: float = 0.0
    backend: str = "auto"

    @property
    def couples(self) -> Couples:
        return "pair"

    @property
    def needs_reference(self) -> bool:
        return True

    def tokens_read(
        self, forest: PackedForest, weights: np.ndarray, advantages: np.ndarray, pairs: np.ndarray
    ) -> np.ndarray:
        """Of the rollouts in pairs, the tokens that do not cancel; with an entropy term all that count."""
        import numpy as np

        from mosaic_kernels.preference.reference import needed_nodes

        counted = weights > 0
        if self.entropy_weight:
            return counted
        if self.kind == "dpo_norm":  # a shared token's two shares differ with the lengths
            paired = np.zeros(forest.num_rollouts, np.bool_)
            paired[pairs.ravel()] = True
            return counted & np.repeat(paired, np.diff(forest.cu_seqlens))
        return counted & needed_nodes(forest, pairs)[forest.node_index]

    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """See `Loss`."""
        from mosaic_kernels import pairwise_preference_loss

        reference, cu_seqlens, pairs = batch.reference_logprobs, batch.cu_seqlens, batch.pairs
        if reference is None or cu_seqlens is None or pairs is None or batch.preference is None:
            raise ValueError(f"{self.kind} needs the whole step with judged pairs and a reference policy")
        preference = batch.preference.to(policy_logprobs.dtype)
        policy = policy_logprobs
        if self.kind == "dpo_norm":
            ones = policy.new_ones(len(policy))
            lengths = batch.rollout_sums(ones).clamp(min=1.0)[batch.rollout_of]
            policy, reference = policy / lengths, reference / lengths
        margins = batch.rollout_sums(policy - reference)
        h = margins[pairs[:, 0]] - margins[pairs[:, 1]]
        if self.kind == "ipo":
            target = 1.0 / (2.0 * self.beta)
            losses = preference * (h - target) ** 2 + (1.0 - preference) * (h + target) ** 2
        else:
            losses = pairwise_preference_loss(
                policy, reference, batch.counted, cu_seqlens, pairs, preference,
                beta=self.beta, backend=self.backend,
            )  # fmt: skip
        count, step_count = len(preference), batch.step_pairs
        loss = losses.sum() / max(1, count if step_count is None else step_count)
        loss = loss + batch.entropy_term(entropy, self.entropy_weight)
        h, decided = h.detach(), preference != 0.5
        agrees = ((h > 0) == (preference > 0.5)) & decided
        margin = (h * (2.0 * preference - 1.0)).sum()
        return loss, {
            **batch.token_metrics(policy_logprobs, entropy),
            "policy/pair_accuracy": SumCount(agrees.sum().double(), decided.sum().double()),
            "policy/pair_margin": SumCount(margin.double(), count),
            "policy/loss": SumCount(loss.detach().double(), 0.0),
        }


@dataclass(frozen=True)
class DPO(PairwiseLoss):
    """Bradley-Terry with soft labels: arXiv 2305.18290, equation 7."""

    kind: Kind = field(default="dpo", init=False)


@dataclass(frozen=True)
class DPONorm(PairwiseLoss):
    """Length-normalised DPO: arXiv 2411.15124 (Tulu 3), equation 6."""

    kind: Kind = field(default="dpo_norm", init=False)
    beta: float = 5.0


@dataclass(frozen=True)
class IPO(PairwiseLoss):
    """arXiv 2310.12036, equation 17, its tau called beta, in expectation over a label of probability p."""

    kind: Kind = field(default="ipo", init=False)
