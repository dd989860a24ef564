"""A part of the reward, and an advantage, of your own.

    python -m mosaic_fast.train --reward.parts align format length examples.my_reward:checks \
        --reward.advantage examples.my_reward:ranks
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mosaic_rollout.types import Rollout


def checks(group: Sequence[Rollout], preferences: np.ndarray) -> np.ndarray:
    """0.1 for a rollout that checked before it acted: [G] numbers, added to R and logged as reward/checks.

    preferences: the judge's [G, G], 1 where the first rollout is better, 0.5 for a tie.
    """
    return np.array([0.1 * any(step.check is not None for step in rollout.steps) for rollout in group])


def ranks(rewards: np.ndarray, group: Sequence[Rollout]) -> np.ndarray:
    """Advantages [G] in [-1, 1] from the order of the rewards [G] alone; equal rewards have equal ones."""
    above = rewards[:, None] > rewards[None, :]
    return (above.sum(1) - above.sum(0)) / (len(rewards) - 1)
