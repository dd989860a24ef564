"""From preferences to advantages: R(i) = r_align + r_fmt - p_len, normalised within the group.

MOSAIC, arXiv 2603.03205, section 3; the normalisation is GRPO's (arXiv 2402.03300, equation 3 and its text).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mosaic_rollout.types import Rollout


@dataclass(frozen=True)
class GroupReward:
    """Every part of the reward of a group's G rollouts, each [G] float64."""

    align: np.ndarray  # sum of preferences over the others, in [0, G-1]
    format: np.ndarray  # in {0, 1, 2}
    length_penalty: np.ndarray  # >= 0

    @property
    def total(self) -> np.ndarray:
        return self.align + self.format - self.length_penalty

    def advantages(self, std_epsilon: float, *, divide_by_std: bool = True) -> np.ndarray:
        """[G] float64: (R - mean) / (std + std_epsilon); 0 for a group of ties.

        divide_by_std: False leaves R - mean as it is (Dr. GRPO, arXiv 2503.20783, section 3.1).
        """
        centred = self.total - self.total.mean()
        if not divide_by_std:
            return centred if np.ptp(self.total) > 0.0 else np.zeros_like(centred)
        spread = float(np.sqrt((centred**2).mean()))
        return centred / (spread + std_epsilon) if spread > 0.0 else np.zeros_like(centred)


def group_reward(group: Sequence[Rollout], preferences: np.ndarray, length_target: float) -> GroupReward:
    """The reward of a group.

    preferences: P [G, G], P[i, j] in {1, 0.5, 0}; the diagonal is left out.
    length_target: L0, generated tokens a step.
    """
    align = preferences.sum(axis=1) - np.diagonal(preferences)
    return GroupReward(
        align=align,
        format=np.array([format_reward(rollout) for rollout in group], dtype=np.float64),
        length_penalty=np.array([length_penalty(rollout, length_target) for rollout in group]),
    )


def format_reward(rollout: Rollout) -> float:
    """1 if every step's tags are well formed, and 1 if it ends in a final answer or refusal_tool."""
    well_formed = bool(rollout.steps) and all(step.well_formed for step in rollout.steps)
    return float(well_formed) + float(rollout.status in ("answered", "refused"))


def length_penalty(rollout: Rollout, length_target: float) -> float:
    """p_len = max(0, (L - L0) / L0) with L the generated tokens a step."""
    tokens_per_step = rollout.generated_tokens / max(1, len(rollout.steps))
    return max(0.0, (tokens_per_step - length_target) / length_target)
