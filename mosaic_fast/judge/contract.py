"""What a judge takes and gives. Anything with a `judge` method of this shape can be one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mosaic_rollout.types import Rollout


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a group of G rollouts.

    Of three rollouts, the first better than the second and as good as the third:
    preferences [[.5, 1, .5], [0, .5, .5], [.5, .5, .5]], reasons {(0, 1): "...", (0, 2): "...", ...}.
    """

    preferences: np.ndarray
    """P [G, G] float64: P[i, j] is 1 where rollout i is better than j, 0.5 for a tie, 0 where it is worse;
    between them for a judge that gives scores. P[i, j] + P[j, i] = 1; the diagonal means nothing."""
    reasons: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """Why pair (i, j), i < j, was decided so, for readers."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What judging took; summed over the groups of a step and logged as judge/<name>."""

    def reason(self, i: int, j: int) -> str:
        """Why i and j, in either order, stand as they do; empty where the judge left none."""
        return self.reasons.get((min(i, j), max(i, j)), "")


class Judge(Protocol):
    """Compares the rollouts of every group of a training step."""

    def judge(self, groups: Sequence[Sequence[Rollout]]) -> list[Judgement]:
        """One judgement a group, in order. All groups at once, so that calls to a server can overlap."""
        ...
