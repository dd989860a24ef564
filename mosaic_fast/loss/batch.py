"""The contract of a loss: what it reads, what it gives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

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

    start_logprobs: Tensor  # [N] the policy's own at the step's start: denominator of the clipped ratio
    reference_logprobs: Tensor | None  # [N] of the frozen reference policy
    advantages: Tensor  # [N] times the off-policy weight, if there is one
    weights: Tensor  # [N] >= 0: credit over the normaliser of the whole step; 0: the token does not count
    cu_seqlens: Tensor | None = None  # [R+1] int64, where rollouts begin; None in a part
    groups: Tensor | None = None  # [R] int64, the group of each rollout; None in a part
    pairs: Tensor | None = None  # [P, 2] int64, judged pairs of rollouts; None in a part
    preference: Tensor | None = None  # [P] in [0, 1]: 1 if the first of the pair is better, 0.5 for a tie

    @property
    def counted(self) -> Tensor:  # [N] bool
        return self.weights > 0

    def part(self, source: Tensor) -> LossBatch:
        """The tokens at `source` [n] int64."""
        reference = self.reference_logprobs
        return LossBatch(
            self.start_logprobs[source],
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
