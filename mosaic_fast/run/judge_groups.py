"""From groups of rollouts to advantages: one rank judges, and all have the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np

from mosaic_fast.config import RewardConfig
from mosaic_fast.distributed import World
from mosaic_fast.preferences import Judge, Judgement
from mosaic_fast.preferences.reward import GroupReward, build_reward
from mosaic_fast.run.folder import RunFolder
from mosaic_fast.run.interrupt import Interrupt, Stopped
from mosaic_fast.run.trajectories import write_trajectories
from mosaic_rollout.types import JsonValue, Rollout


@dataclass(frozen=True)
class GroupPreferences:
    """What judging a step's groups gives: for each group arrays [G] or [G, G] of float64."""

    preferences: list[np.ndarray]
    totals: list[np.ndarray]  # the rewards
    advantages: list[np.ndarray]
    judgements: Sequence[Judgement] = ()  # of the rank that judged
    rewards: Sequence[GroupReward] = ()  # of the rank that judged


def judge_groups(
    judge: Judge | None,  # of the first rank
    groups: Sequence[Sequence[Rollout]],
    config: RewardConfig,
    folder: RunFolder,
    step: int,  # done before this one
    world: World,
    interrupt: Interrupt | None = None,
) -> GroupPreferences:
    """Judge a step and write its trajectories on the first rank; the others are told, to the bit.

    Which tokens are trained on follows from these numbers, and the ranks must not differ in it. Stopped on
    every rank where the one that judges was asked to stop.
    """
    judged: GroupPreferences | None = None
    try:
        with nullcontext() if interrupt is None else interrupt.abandonable():
            judged = None if judge is None else _judged(judge, groups, config, folder, step)
    except Stopped:
        if world.size > 1:
            world.from_first([])
        raise
    if judged is not None and world.size == 1:
        return judged
    numbers: JsonValue = None
    if judged is not None:
        kinds = (judged.preferences, judged.totals, judged.advantages)
        numbers = [[array.tolist() for array in arrays] for arrays in kinds]
    told = cast("list[list[JsonValue]]", world.from_first(numbers))
    if not told:
        raise Stopped
    preferences, totals, advantages = ([np.array(values, np.float64) for values in kind] for kind in told)
    return judged or GroupPreferences(preferences, totals, advantages)


def _judged(
    judge: Judge, groups: Sequence[Sequence[Rollout]], config: RewardConfig, folder: RunFolder, step: int
) -> GroupPreferences:
    judgements = judge.judge(groups)
    rule = build_reward(config)
    rewards = [
        rule.reward(group, judgement.preferences) for group, judgement in zip(groups, judgements, strict=True)
    ]
    advantages = [rule.advantages(group, reward) for group, reward in zip(groups, rewards, strict=True)]
    with folder.writing("the trajectories"):
        write_trajectories(folder.trajectory_path(step + 1), groups, judgements, rewards, advantages)
    totals = [reward.total for reward in rewards]
    return GroupPreferences([j.preferences for j in judgements], totals, advantages, judgements, rewards)
