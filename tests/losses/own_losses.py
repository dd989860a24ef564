"""Losses as users write them, for tests: sound ones and others."""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_fast.losses import LossBatch


class TokenWise:
    token_wise = True

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        ratio = (policy_logprobs - batch.old_logprobs).exp()
        return -self.scale * (batch.weights * ratio * batch.advantages).sum()


class Coupled:
    """The square of a rollout's drift from the reference, which couples its tokens."""

    needs_reference = True
    normalisation = "sequence"

    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        assert batch.reference_logprobs is not None
        return (batch.rollout_sums(policy_logprobs - batch.reference_logprobs) ** 2).sum()


class Mean(TokenWise):
    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        return -(policy_logprobs * batch.advantages).mean()


class Raises:
    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        raise KeyError("temperature")


class Infinite:
    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        return policy_logprobs.sum() * torch.inf


class Vector:
    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        return policy_logprobs


class Constant:
    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        return policy_logprobs.detach().sum()


class Metrics:
    def __call__(
        self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None
    ) -> tuple[Tensor, dict[str, float]]:
        return policy_logprobs.sum(), {"x": float("nan")}


class NotCallable:
    pass


class TwoArguments:
    def __call__(self, policy_logprobs: Tensor, batch: LossBatch) -> Tensor:
        return policy_logprobs.sum()


class Compares(TokenWise):
    pairwise = True


class Says(TokenWise):
    normalisation = "rollout"
