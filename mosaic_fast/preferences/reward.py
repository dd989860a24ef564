"""From preferences to advantages: R(i) = r_align + r_fmt - p_len, normalised within the group.

MOSAIC, arXiv 2603.03205 (docs/method.md says what is known of it). The normalisation is that of GRPO, arXiv
2402.03300, equation 3 and its text, but where lengths alone differ.
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

    @property
    def tied(self) -> bool:
        """Whether all rewards are equal, but for the rounding of the sums that they are."""
        return self._equal(self.total)

    @property
    def by_length_alone(self) -> bool:
        """Whether judge and format tie, and nothing but the length tells the rollouts apart."""
        return not self.tied and self._equal(self.align + self.format)

    def advantages(self, std_epsilon: float, *, divide_by_std: bool = True) -> np.ndarray:
        """[G] float64: (R - mean) / (std + std_epsilon); exactly 0 for a group of ties.

        Where judge and format tie, the standard deviation is the length penalty's own, and dividing by it
        would make of any difference in length what a won comparison is. There std_epsilon counts as at least
        1, a won comparison: p_len of 0 and 0.02 give 0.0099 and -0.0099, whatever std_epsilon is.

        divide_by_std: False leaves R - mean as it is (Dr. GRPO, arXiv 2503.20783, section 3.1).
        """
        if self.tied:
            return np.zeros_like(self.total)
        centred = self.total - self.total.mean()
        if not divide_by_std:
            return centred
        epsilon = max(std_epsilon, 1.0) if self.by_length_alone else std_epsilon
        return centred / (float(np.sqrt((centred**2).mean())) + epsilon)

    def _equal(self, values: np.ndarray) -> bool:
        """Whether sums of the parts agree: each has at most G + 1 terms, and is rounded as they are added."""
        largest = np.max(np.abs(self.align) + self.format + self.length_penalty, initial=0.0)
        return bool(np.ptp(values) <= 2.0 * (len(values) + 1) * np.finfo(np.float64).eps * largest)


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
