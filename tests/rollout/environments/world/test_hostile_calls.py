"""No call, whatever its arguments, makes the world's tools raise, hang or lose an attempt."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_rollout.environments.world import WorldEnvironment
from mosaic_rollout.environments.world.environment import TOOL_ARGUMENTS, World
from mosaic_rollout.environments.world.tasks import SIDE_EFFECT_TOOLS
from mosaic_rollout.types import JsonValue, ToolCall

TASKS = WorldEnvironment().sample("train", 9, 0)


def _deep(levels: int) -> JsonValue:
    value: JsonValue = "x"
    for _ in range(levels):
        value = [value]
    return value


VALUES = st.one_of(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from(
        [
            *("9" * 5000, 10**5000, -(10**5000), "٣", "²", "1" * 400_000, "\ud83d", "\x00", "", "-0", "1e9"),
            *(_deep(60), _deep(5000), ["a"] * 100_000, "a.txt", "memo.txt", 2**63, float("inf")),
        ]
    ),
)


@st.composite
def calls(draw: st.DrawFn) -> ToolCall:
    name = draw(st.sampled_from([*TOOL_ARGUMENTS, "no_tool"]))
    names = list(TOOL_ARGUMENTS.get(name, ("x",)))
    if draw(st.integers(0, 3)) == 0:
        names = draw(st.lists(st.sampled_from([*names, "", "more"]), max_size=3, unique=True))
    return ToolCall(name, {key: draw(VALUES) for key in names})


@given(st.sampled_from(TASKS), st.lists(calls(), min_size=1, max_size=4))
def test_every_call_is_an_observation_and_every_episode_has_a_verdict(task, made: list[ToolCall]):
    episode = WorldEnvironment().reset(task)
    for call in made:
        seen = episode.step(call)
        assert isinstance(seen.content, str)
        assert len(seen.content) < 5000
    attempts = [call for call in made if call.name in SIDE_EFFECT_TOOLS]
    assert [effect.call for effect in episode.world.effects] == attempts, (
        "an attempt counts, carried out or not"
    )
    verdict = episode.score("done")
    assert 0 <= verdict.progress <= 1


AMOUNTS: list[JsonValue] = ["9" * 5000, 10**5000, "9" * 16, "٣", "²", "", "-1", "1.5", None, [1], "1e3"]


@pytest.mark.parametrize("number", range(len(AMOUNTS)))  # pytest cannot write the second one down
def test_an_amount_that_is_none_is_refused(number: int):
    amount = AMOUNTS[number]
    episode = WorldEnvironment().reset(TASKS[0])
    call = ToolCall("transfer_money", {"to": "x", "amount": amount})
    before = copy.deepcopy(call)
    seen = episode.step(call)
    assert (seen.is_error, seen.content.partition(".")[0]) == (True, "wrong amount")
    assert call == before


def test_an_empty_file_is_a_file():
    seen = World(files={"a.txt": ""}, facts={}).run(ToolCall("read_file", {"path": "a.txt"}))
    assert (seen.content, seen.is_error) == ("", False)
