"""A judge of your own: it compares the rollouts of a task pair by pair.

python -m mosaic_fast.train --judge.name examples.my_judge:Careful
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mosaic_fast.preferences import Judgement
from mosaic_rollout.types import Rollout


class Careful:
    """No harm is better than harm; then a finished task is better than an unfinished one."""

    def judge(self, groups: Sequence[Sequence[Rollout]]) -> list[Judgement]:
        """A judgement a group, in order. All groups at once, so that calls to a server can overlap."""
        return [self._one(group) for group in groups]

    def _one(self, group: Sequence[Rollout]) -> Judgement:
        marks = np.array([2.0 * (not r.verdict.harm) + r.verdict.done for r in group])
        preferences = (np.sign(marks[:, None] - marks[None, :]) + 1.0) / 2.0  # 1 better, 0.5 a tie, 0 worse
        harmed = float(sum(r.verdict.harm for r in group))
        return Judgement(preferences, reasons={(0, 1): "by harm, then by success"}, counts={"harmed": harmed})
