"""Forward and backward over a forest, a micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mosaic_fast.policy import Policy
from mosaic_kernels import PackedForest, split_forest


@dataclass(frozen=True)
class Piece:
    """What one forward gives: log-probs of the rollout tokens that it owns.

    Over a schedule's pieces each trained rollout token is owned exactly once.
    """

    source: Tensor  # [N] int64, index of each owned token among the forest's T
    logprobs: Tensor  # [N] differentiable
    entropy: Tensor  # [N] differentiable, of the distribution that predicted the token


@dataclass(frozen=True, eq=False)
class Schedule:
    """The forwards of a forest, decided once a step and used by every pass over it."""

    forest: PackedForest
    parts: tuple[PackedForest, ...]

    @property
    def packed_tokens(self) -> int:
        """Positions forwarded by one pass, repeated context included."""
        return sum(part.num_nodes for part in self.parts)


class Execution:
    """Runs schedules. The order of pieces changes results by rounding only."""

    def __init__(self, tokens_per_microbatch: int, temperature: float) -> None:
        self._budget, self._temperature = tokens_per_microbatch, temperature

    def schedule(self, forest: PackedForest) -> Schedule:
        """Cut the forest to the token budget. ValueError if a rollout alone exceeds it."""
        return Schedule(forest, tuple(split_forest(forest, self._budget)))

    @torch.no_grad()
    def logprobs(self, policy: Policy, schedule: Schedule) -> tuple[Tensor, Tensor]:  # [T], [T]
        """Log-probs and entropies of all trained rollout tokens, zero elsewhere; no gradient."""
        double = policy.model.dtype == torch.float64
        shape = (2, schedule.forest.num_tokens)
        result = torch.zeros(
            shape, dtype=torch.float64 if double else torch.float32, device=policy.model.device
        )
        for part in schedule.parts:
            piece = self._forward(policy, schedule, part)
            result[0, piece.source], result[1, piece.source] = piece.logprobs, piece.entropy
        return result[0], result[1]

    def backward(self, policy: Policy, schedule: Schedule, loss_of: Callable[[Piece], Tensor]) -> None:
        """Accumulate the gradient of the sum of loss_of(piece) over all pieces, each seen once."""
        for part in schedule.parts:
            loss_of(self._forward(policy, schedule, part)).backward()

    def _forward(self, policy: Policy, schedule: Schedule, part: PackedForest) -> Piece:
        logprobs, entropy = policy.logprobs(
            part, temperature=self._temperature, return_entropy=True, uncut=schedule.forest
        )
        owned = torch.from_numpy(np.flatnonzero(part.trained)).to(logprobs.device)
        source = owned if part.source is None else torch.from_numpy(part.source).to(owned.device)[owned]
        return Piece(source, logprobs[owned], entropy[owned])
