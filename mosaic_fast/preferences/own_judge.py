"""A user's own judge: run, awaited, and its judgements looked at before they are paid out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from mosaic_fast.errors import UserError
from mosaic_fast.preferences.judge import Judge, Judgement
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.checks import finite_float, shown
from mosaic_rollout.foreign.code import call_named, get_method, import_named
from mosaic_rollout.types import Rollout


def load_judge(spec: str) -> Judge:
    """An instance of the class that `module:Class` names; the working directory is searched first.

    It has a method `judge` (see `Judge`) or a method `score_group(group)` that gives G finite numbers, on any
    scale; either may be async. UserError names what is wrong with the class, and later with what it gives.
    """
    what = f"judge.name {spec!r}"
    factory = import_named(spec, "judge.name")
    if not any(get_method(factory, method, what) for method in ("judge", "score_group")):
        raise UserError(f"{what}: it has no method judge or score_group")
    return guarded_judge(call_named(spec, "judge.name", factory), spec)


def guarded_judge(made: object, spec: str) -> Judge:
    """A user's object with a method `judge` or `score_group` as a judge; see `load_judge`.

    spec: how errors call it, `module:Class`.
    """
    what = f"judge.name {spec!r}"
    judge = get_method(made, "judge", what)
    if judge is not None:
        return _Own(judge, spec)
    score = get_method(made, "score_group", what)
    if score is None:
        raise UserError(f"{what}: what it makes has no method judge or score_group")
    return _ByScore(score, spec, f"{type(made).__name__}.score_group")


class _ByScore:
    """Compares rollouts by a user's scores: the higher one is better, equals are a tie."""

    def __init__(self, score: Callable[..., object], name: str, method: str) -> None:
        self._score, self._name, self._method = score, name, method
        self._code = ForeignCode(f"judge.name {name!r}")

    def judge(self, groups: Sequence[Sequence[Rollout]]) -> list[Judgement]:
        return [self._judgement(group) for group in groups]

    def _judgement(self, group: Sequence[Rollout]) -> Judgement:
        found = self._code.demand(f"{self._name}: {self._method}", self._score, copies(group))
        scores = one_number_each(found, len(group), self._method)
        pairs = combinations(range(len(group)), 2)
        reasons = {(i, j): f"score {scores[i]:g} against {scores[j]:g}" for i, j in pairs}
        better = (scores[:, None] > scores[None, :]).astype(np.float64)
        return Judgement(better + 0.5 * (1.0 - better - better.T), reasons)


class _Own:
    """Judges by a user's method `judge`."""

    def __init__(self, judge: Callable[..., object], name: str) -> None:
        self._judge, self._name = judge, name
        self._code = ForeignCode(f"judge.name {name!r}")

    def judge(self, groups: Sequence[Sequence[Rollout]]) -> list[Judgement]:
        given = [copies(group) for group in groups]
        found = self._code.demand(f"{self._name}: judge", self._judge, given)
        if not isinstance(found, Sequence) or len(found) != len(groups):
            count = f"{len(found)} judgements" if isinstance(found, Sequence) else shown(found)
            raise UserError(f"{self._name}: {count} for {len(groups)} groups")
        return [self._checked(one, len(group)) for one, group in zip(found, groups, strict=True)]

    def _checked(self, judgement: object, size: int) -> Judgement:
        if not isinstance(judgement, Judgement):
            raise UserError(
                f"{self._name}: judge must give a Judgement of mosaic_fast.preferences for each group, not "
                f"{shown(judgement)}"
            )
        p = _numbers(judgement.preferences)
        if p is None:
            raise UserError(f"{self._name}: preferences must be numbers, not {shown(judgement.preferences)}")
        if p.shape != (size, size):
            raise UserError(f"{self._name}: preferences {p.shape} for {size} rollouts; want {(size, size)}")
        if not ((p >= 0) & (p <= 1)).all() or not np.allclose(p + p.T, 1.0):
            raise UserError(
                f"{self._name}: preferences must be in [0, 1] with P[i, j] + P[j, i] = 1, 0.5 for i = j"
            )
        reasons, counts = judgement.reasons, judgement.counts
        if not isinstance(reasons, Mapping) or not isinstance(counts, Mapping):
            raise UserError(f"{self._name}: reasons and counts of a Judgement must be dicts")
        what = f"of the counts of {self._name}"
        return Judgement(
            p,
            {pair: str(reason) for pair, reason in reasons.items()},
            {str(name): finite_float(value, f'"{name}" {what}') for name, value in counts.items()},
        )


def one_number_each(found: object, size: int, what: str) -> np.ndarray:  # [size] float64
    """What foreign code gave for the rollouts of a group. UserError unless it is one finite number each."""
    numbers = _numbers(found)
    if numbers is None or numbers.shape != (size,) or not np.isfinite(numbers).all():
        raise UserError(
            f"{what}: want one number for each of {size} rollouts, each finite, got {shown(found)}"
        )
    return numbers


def copies(group: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts of a group for a judge to keep and to change: what is trained on stays as it is.

    A task's payload that cannot be copied is shared.
    """
    return [_copy(rollout) for rollout in group]


def _copy(rollout: Rollout) -> Rollout:
    try:
        return copy.deepcopy(rollout)
    except Exception:  # noqa: BLE001  __deepcopy__ of a payload may raise anything
        return replace(
            copy.deepcopy(replace(rollout, task=replace(rollout.task, payload=None))), task=rollout.task
        )


def _numbers(found: object) -> np.ndarray | None:
    """An array of real numbers as float64, also from a tensor that has a gradient or lies on a GPU."""
    try:
        for method in ("detach", "cpu"):
            step = getattr(found, method, None)
            found = step() if callable(step) else found
        array = np.asarray(found)
        return np.array(array, dtype=np.float64) if array.dtype.kind in "biufO" else None  # no text, complex
    except KeyboardInterrupt:
        raise
    except Exception:  # noqa: BLE001  ragged lists, texts, None, and whatever else is no array
        return None
