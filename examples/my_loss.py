"""A loss of your own: the plain policy gradient, with an option that bounds advantages.

python -m mosaic_fast.train --loss.name examples.my_loss:PolicyGradient --loss.options most 2.0
"""

from __future__ import annotations

from torch import Tensor

from mosaic_fast.losses import LossBatch, SumCount


class PolicyGradient:
    """-sum of weights * advantage * log-prob, over the tokens that count.

    token_wise: a term reads its own token alone, so micro-batches may be done one after the other. Leave it
    out, and the loss is given all tokens of the step at once, with batch.cu_seqlens, pairs and preference.
    needs_reference, pairwise and normalisation may be declared in the same way.
    """

    token_wise = True

    def __init__(self, most: float = 5.0) -> None:
        self.most = most

    def __call__(
        self,
        policy_logprobs: Tensor,  # [N], differentiable, as `entropy` is; 0 where batch.weights is 0
        batch: LossBatch,
        entropy: Tensor | None,
    ) -> tuple[Tensor, dict[str, SumCount]]:
        """The loss, and what to log of it as loss/<name>: sums and counts, so that parts add up."""
        advantages = batch.advantages.clamp(-self.most, self.most)
        loss = -(batch.weights * advantages * policy_logprobs).sum()
        bounded = (batch.advantages.abs() > self.most) & batch.counted
        return loss, {"bounded_frac": SumCount(float(bounded.sum()), float(batch.counted.sum()))}
