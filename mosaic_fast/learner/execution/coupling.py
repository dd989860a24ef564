"""Which forwards hold all that their tokens are coupled with: on these a loss needs no pass before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from mosaic_fast.distributed import ALONE, World
from mosaic_fast.learner.execution.schedule import Forward, Schedule
from mosaic_fast.losses import Couples
from mosaic_fast.policy.forest_tensors import IntArray
from mosaic_kernels import PackedForest
from mosaic_kernels.forest.layout import BoolArray
from mosaic_rollout.types import JsonValue


@dataclass(frozen=True, eq=False)
class Coupling:
    """What of a schedule needs one pass, and what two: log-probs first, then the gradient.

    Rollouts of one unit are coupled with each other and with no others. Where a unit's trained tokens all
    lie in one forward, and so do those of every unit there, the forward needs one pass.
    """

    one_pass: BoolArray  # [R] rollouts in forwards that need one pass
    rollouts: Mapping[Forward, BoolArray]  # [R] of each such forward of this rank
    rest: Schedule  # the forwards that need two, with those that they stand on

    def figures(self, schedule: Schedule) -> dict[str, float]:
        """`tree/one_pass_frac`: of the positions that this rank forwards, those that it forwards once."""
        total = schedule.packed_tokens
        return {"tree/one_pass_frac": 1.0 - self.rest.packed_tokens / total if total else 1.0}

    @property
    def has_rest(self) -> bool:
        """Whether any rank has forwards that need two passes."""
        return bool(self.rest.parts) or self.rest.idle > 0


def units_of(couples: Couples, pairs: IntArray, num_rollouts: int) -> IntArray:  # [P, 2] -> [R]
    """The unit of each rollout: itself, what judged pairs connect it with, or the whole step.

    Example: pairs [[0, 1], [1, 2]] of four rollouts give [0, 0, 0, 3].
    """
    unit = np.arange(num_rollouts)
    if couples == "step":
        return np.zeros_like(unit)
    while couples == "pair" and len(pairs):
        lowest = np.minimum(unit[pairs[:, 0]], unit[pairs[:, 1]])
        joined = unit.copy()
        for side in (0, 1):
            np.minimum.at(joined, pairs[:, side], lowest)
        if (joined == unit).all():
            break
        unit = joined
    return unit


def coupling_of(
    schedule: Schedule, unit_of: IntArray, rollouts: IntArray | None = None, world: World = ALONE
) -> Coupling:
    """Find the forwards that need one pass.

    rollouts: [R+1] where they begin among the tokens; None: each is one sequence of the forest. On several
    ranks these are all or none, so that every rank makes the same passes.
    """
    forest = schedule.forest
    unit_of_token = np.repeat(unit_of, np.diff(forest.cu_seqlens if rollouts is None else rollouts))
    owned = [part.owned_tokens for part in schedule.parts]
    first, last = _owners(owned, unit_of_token, len(unit_of), world)
    complete = first >= last  # in one forward, or without a trained token
    if world.size > 1:
        alone = [bool(complete.all())] * len(owned)
        rest = replace(schedule, parts=(), idle=0) if complete.all() else schedule
        one_pass = (last >= 0)[unit_of] & complete.all()
    else:
        alone = [bool(complete[unit_of_token[tokens]].all()) for tokens in owned]
        rest = schedule.only(i for i, ready in enumerate(alone) if not ready)
        ready_units = [unit_of_token[tokens] for tokens, ready in zip(owned, alone, strict=True) if ready]
        one_pass = np.isin(unit_of, np.concatenate([*ready_units, np.zeros(0, np.int64)]))
    selected = {
        part: np.isin(unit_of, unit_of_token[tokens])
        for part, tokens, ready in zip(schedule.parts, owned, alone, strict=True)
        if ready
    }
    return Coupling(one_pass, selected, rest)


def _owners(
    owned: Sequence[IntArray], unit_of_token: IntArray, num_units: int, world: World
) -> tuple[IntArray, IntArray]:  # [R], [R]
    """The first and the last forward of each unit over all ranks; last is -1 where there is none."""
    most = world.maximum(len(owned))
    first, last = np.full(num_units, np.iinfo(np.int64).max), np.full(num_units, -1)
    for index, tokens in enumerate(owned):
        number, units = world.rank * most + index, np.unique(unit_of_token[tokens])
        first[units], last[units] = np.minimum(first[units], number), number
    if world.size == 1:
        return first, last
    own: JsonValue = [first.tolist(), last.tolist()]
    every = np.array(cast(list[list[list[int]]], world.gather(own)))  # [ranks, 2, R]
    return every[:, 0].min(axis=0), every[:, 1].max(axis=0)


def second_passes(
    parts: tuple[Forward, ...], forest: PackedForest, unit_of: IntArray, rollouts: IntArray | None = None
) -> tuple[Forward, ...]:
    """The forwards of a plan that would run twice, on one rank."""
    return coupling_of(Schedule(forest, parts, "", {}), unit_of, rollouts).rest.parts
