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


class _Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        raise ValueError("no such gradient")


class RaisesInBackward:
    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        return _Broken.apply(policy_logprobs)


class SteepAtZero:
    """Finite, with a gradient that is not: of the token that does not count and is 0, or of all."""

    token_wise = True

    def __init__(self, everywhere: bool) -> None:
        self._everywhere = everywhere

    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        zero = policy_logprobs * 0 if self._everywhere else policy_logprobs
        return (batch.weights * (zero.abs().sqrt() + policy_logprobs)).sum()


class Writes:
    """As `TokenWise`, but in place."""

    token_wise = True

    def __call__(self, policy_logprobs: Tensor, batch: LossBatch, entropy: Tensor | None) -> Tensor:
        return -(policy_logprobs.mul_(batch.weights)).mul_(batch.advantages).sum()


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
