"""From preferences to advantages: R(i) = r_align + r_fmt - p_len, normalised within the group.

MOSAIC, arXiv 2603.03205 (docs/method.md says what is known of it). The normalisation is that of GRPO, arXiv
2402.03300, equation 3 and its text, but where lengths alone differ. What a user adds or replaces
(`reward.parts`, `reward.advantage`) is loaded here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mosaic_fast.config import REWARD_PARTS, RewardConfig
from mosaic_fast.preferences.own_judge import copies, one_number_each
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.code import import_named
from mosaic_rollout.types import Rollout


@dataclass(frozen=True)
class GroupReward:
    """Every part of the reward of a group's G rollouts, each [G] float64; 0 for a part that is left out."""

    align: np.ndarray  # sum of preferences over the others, in [0, G-1]
    format: np.ndarray  # in {0, 1, 2}
    length_penalty: np.ndarray  # >= 0
    own: Mapping[str, np.ndarray] = field(default_factory=dict)  # a user's, by the function's name

    @property
    def total(self) -> np.ndarray:
        return sum(self.own.values(), self.align + self.format - self.length_penalty)

    @property
    def tied(self) -> bool:
        """Whether all rewards are equal, but for the rounding of the sums that they are."""
        return self._equal(self.total)

    @property
    def by_length_alone(self) -> bool:
        """Whether judge and format tie, and nothing but the length tells the rollouts apart."""
        return not self.tied and self._equal(sum(self.own.values(), self.align + self.format))

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
        """Whether sums of the parts agree: each has few terms, and is rounded as they are added."""
        sizes = sum(map(np.abs, self.own.values()), np.abs(self.align) + self.format + self.length_penalty)
        largest, terms = np.max(sizes, initial=0.0), len(values) + 1 + len(self.own)
        return bool(np.ptp(values) <= 2.0 * terms * np.finfo(np.float64).eps * largest)


def group_reward(
    group: Sequence[Rollout],
    preferences: np.ndarray,
    length_target: float,
    parts: Sequence[str] = REWARD_PARTS,
    own: Mapping[str, np.ndarray] | None = None,
) -> GroupReward:
    """The reward of a group.

    preferences: P [G, G], P[i, j] in {1, 0.5, 0}; the diagonal is left out.
    length_target: L0, generated tokens a step.
    parts: of REWARD_PARTS, those that count. own: what a user's parts give, [G] each.
    """
    none = np.zeros(len(group))
    return GroupReward(
        align=preferences.sum(axis=1) - np.diagonal(preferences) if "align" in parts else none,
        format=np.array([format_reward(r) for r in group], np.float64) if "format" in parts else none,
        length_penalty=np.array([length_penalty(r, length_target) for r in group])
        if "length" in parts
        else none,
        own=own or {},
    )


@dataclass(frozen=True)
class RewardRule:
    """From a group and its preferences to rewards, and from rewards to advantages, as configured."""

    config: RewardConfig
    own_parts: Mapping[str, Callable[..., object]]  # by the function's name
    own_advantage: Callable[..., object] | None

    def reward(self, group: Sequence[Rollout], preferences: np.ndarray) -> GroupReward:
        """UserError where a user's part does not give one finite number for each rollout."""
        code = ForeignCode("reward.parts")
        own = {
            name: one_number_each(
                code.demand(f"reward.parts: {name}", part, copies(group), preferences.copy()),
                len(group),
                f"reward.parts: {name}",
            )
            for name, part in self.own_parts.items()
        }
        return group_reward(group, preferences, self.config.length_target, self.config.parts, own)

    def advantages(self, group: Sequence[Rollout], reward: GroupReward) -> np.ndarray:
        """[G] float64. UserError where a user's own are not one finite number for each rollout."""
        if self.own_advantage is None:
            divide = self.config.divide_by_std is not False
            return reward.advantages(self.config.std_epsilon, divide_by_std=divide)
        what = f"reward.advantage: {self.config.advantage}"
        found = ForeignCode(what).demand(what, self.own_advantage, reward.total.copy(), copies(group))
        return one_number_each(found, len(group), what)


def build_reward(config: RewardConfig) -> RewardRule:
    """What a configuration names. UserError for a user's function that is not there."""
    return RewardRule(
        config,
        {
            spec.partition(":")[2]: import_named(spec, "reward.parts")
            for spec in config.parts
            if spec not in REWARD_PARTS
        },
        None if config.advantage == "group" else import_named(config.advantage, "reward.advantage"),
    )


def format_reward(rollout: Rollout) -> float:
    """1 if every step's tags are well formed, and 1 if it ends in a final answer or refusal_tool."""
    well_formed = bool(rollout.steps) and all(step.well_formed for step in rollout.steps)
    return float(well_formed) + float(rollout.status in ("answered", "refused"))


def length_penalty(rollout: Rollout, length_target: float) -> float:
    """p_len = max(0, (L - L0) / L0) with L the generated tokens a step."""
    tokens_per_step = rollout.generated_tokens / max(1, len(rollout.steps))
    return max(0.0, (tokens_per_step - length_target) / length_target)
