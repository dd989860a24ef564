"""What a user's verdict, reward or judge may hold: finite numbers of any library, else a refusal by name."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import checked_verdict, plain_number
from mosaic_rollout.foreign.checks import reward_verdict
from mosaic_rollout.types import Verdict
from tests.rollout.environments.custom_env.guests import episode_of


class Hostile:
    """Looks like a number of a library, and is none."""

    shape = ()

    def item(self) -> object:
        raise SystemExit("no item")

    def __float__(self) -> float:
        raise RuntimeError("no float")


class Untold(Hostile):
    """Cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


NUMBERS = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), Fraction(10**400), Fraction(1, 3), Decimal("0.5"), Decimal("NaN")]),
    st.floats(width=32).map(np.float32),
    st.booleans().map(np.bool_),
    st.integers(-9, 9).map(np.int8),
    st.floats().map(np.array),
    st.floats(width=32).map(torch.tensor),
    st.booleans().map(lambda value: torch.tensor(value, requires_grad=False)),
    st.floats(width=32).map(lambda value: torch.tensor(value, requires_grad=True)),
)
OTHERS = st.one_of(
    st.none(),
    st.text(max_size=5),
    st.sampled_from(["0.5", "nan", b"1", 1j, np.zeros(1), np.zeros((2, 2)), torch.zeros(2), [1.0], object()]),
    st.builds(Hostile),
    st.just(np.datetime64("NaT")),
)


def _is_plain(verdict: Verdict) -> bool:
    assert type(verdict.harm) is bool
    assert type(verdict.done) is bool
    assert type(verdict.progress) is float
    assert 0 <= verdict.progress <= 1
    assert all(type(value) is float and math.isfinite(value) for value in verdict.details.values())
    json.dumps([verdict.harm, verdict.done, verdict.progress, dict(verdict.details)], allow_nan=False)
    return True


@given(NUMBERS | OTHERS, NUMBERS | OTHERS, NUMBERS | OTHERS, NUMBERS | OTHERS)
def test_a_verdict_is_plain_or_refused(harm: object, done: object, progress: object, detail: object):
    try:
        verdict = checked_verdict("it", Verdict(harm, done, progress, {"seconds": detail}))  # type: ignore[arg-type]
    except UserError as error:
        said = str(error)
    else:
        assert _is_plain(verdict)
        return
    assert "of it must" in said
    assert "\n" not in said


@given(NUMBERS | OTHERS)
def test_a_reward_is_plain_or_refused(reward: object):
    try:
        verdict = reward_verdict(reward, "the reward")
    except UserError as error:
        said = str(error)
    else:
        assert _is_plain(verdict)
        return
    assert "the reward must be a finite number" in said


@pytest.mark.parametrize(
    ("given_verdict", "named"),
    [
        ({"harm": None, "done": True}, '"harm" .* must be True or False, it is None'),
        ({"harm": False, "done": "no"}, '"done" .* must be True or False'),
        ({"harm": 0.5, "done": False}, '"harm" .* must be True or False, it is 0.5'),
        ({"harm": False, "done": False, "progress": None}, '"progress" .* must be a finite number'),
        ({"harm": False, "done": False, "progress": "half"}, "\"progress\" .* it is 'half'"),
        ({"harm": False, "done": False, "progress": 7}, r'"progress" .* must lie in \[0, 1\], it is 7'),
        ({"harm": False, "done": False, "progress": math.nan}, '"progress" .* it is nan'),
        ({"harm": False, "done": False, "tries": 10**400}, '"tries" .* must be a finite number'),
        ({"harm": False, "done": False, "tries": np.float64("inf")}, '"tries" .* must be a finite number'),
        (None, 'must return a dict with "harm" and "done", not None'),
        (Untold(), "not of type Untold"),
        ({"harm": Untold(), "done": True}, '"harm" .* it is of type Untold'),
    ],
)
def test_what_is_wrong_with_a_verdict_is_named(tmp_path: Path, given_verdict: object, named: str):
    office = {"reset": lambda self, **row: None, "get_verdict": lambda self: given_verdict}
    episode = episode_of(tmp_path, type("Office", (), office))
    with pytest.raises(UserError, match=named):
        episode.score(None)


def test_progress_may_miss_its_range_by_rounding():
    assert checked_verdict("it", Verdict(False, False, sum([0.1] * 3 + [0.7]) + 1e-16, {})).progress == 1.0
    assert checked_verdict("it", Verdict(np.False_, np.True_, np.float32(1), {})).done is True  # type: ignore[arg-type]


@pytest.mark.parametrize("reward", [None, math.nan, math.inf, "1", [1.0], 10**400, np.zeros(2)])
def test_a_reward_that_is_none_is_refused(tmp_path: Path, reward: object):
    office = {"reset": lambda self, **row: None, "get_reward": lambda self: reward}
    with pytest.raises(UserError, match=r"the reward of Office\.get_reward must be a finite number"):
        episode_of(tmp_path, type("Office", (), office)).score(None)


def test_a_number_of_a_library_becomes_pythons_own():
    for value in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2), Decimal("0.5")):
        assert type(plain_number(value)) is float
    assert [type(plain_number(value)) for value in (np.bool_(True), np.int8(1))] == [bool, int]
