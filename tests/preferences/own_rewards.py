"""Parts of a reward and advantages as users write them, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mosaic_rollout.types import Rollout


def halves(group: Sequence[Rollout], preferences: np.ndarray) -> list[float]:
    preferences[:] = -1.0  # a copy
    return [0.5 * index for index in range(len(group))]


def total(group: Sequence[Rollout], preferences: np.ndarray) -> np.ndarray:
    return np.zeros(len(group))


def few(group: Sequence[Rollout], preferences: np.ndarray) -> list[float]:
    return [1.0]


def nan(group: Sequence[Rollout], preferences: np.ndarray) -> list[float]:
    return [float("nan")] * len(group)


def raises(group: Sequence[Rollout], preferences: np.ndarray) -> list[float]:
    raise ZeroDivisionError("no rollouts")


def signs(rewards: np.ndarray, group: Sequence[Rollout]) -> np.ndarray:
    return np.sign(rewards - rewards.mean())
