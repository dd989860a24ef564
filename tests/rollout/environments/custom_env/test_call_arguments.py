"""Arguments are checked before a tool sees them, and what it does to them stays its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_rollout.foreign.checks import wrong_arguments
from mosaic_rollout.types import JsonValue, ToolCall, ToolSchema
from tests.rollout.environments.custom_env.guests import Quiet, episode_of

SEEN: list[dict[str, object]] = []


class Shop(Quiet):
    def buy(
        self,
        items: list[str],
        count: int,
        size: Literal["s", "l"] = "s",
        price: float = 1.0,
        note: str | None = None,
        options: dict[str, int] | None = None,
    ) -> str:
        """Buy.

        Args:
            items: What.
            count: How many.
            size: Which.
            price: At most.
            note: For whom.
            options: More.
        """
        SEEN.append({"items": items, "count": count})
        items.clear()
        if options is not None:
            options.clear()
        return "bought"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"price": 2}, None),
        ({"note": None, "options": None}, None),
        ({"note": "x", "options": {"wrap": 1}}, None),
        ({"count": 3.0}, None),  # JSON has one kind of number
        ({"count": "3"}, "argument 'count': '3' is not of type 'integer'"),
        ({"count": True}, "'count': True is not of type 'integer'"),
        ({"count": None}, "'count': None is not of type 'integer'"),
        ({"count": 3.5}, "'count': 3.5 is not of type 'integer'"),
        ({"items": "a"}, "'items': 'a' is not of type 'array'"),
        ({"items": ["a", 1]}, "'items'[1]: 1 is not of type 'string'"),
        ({"size": "xl"}, "'size': 'xl' is not one of ['s', 'l']"),
        ({"options": {"wrap": "yes"}}, "'options'"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'; it takes items, count"),
        ({"price": float("nan")}, "a number is too large"),
        ({"count": 10**30}, "a number is too large"),
        ({"items": None}, "'items': None is not of type 'array'"),
    ],
)
def test_what_does_not_fit_is_named_and_never_seen(
    tmp_path: Path, changed: dict[str, JsonValue], said: str | None
):
    SEEN.clear()
    arguments: dict[str, JsonValue] = {"items": ["a", "b"], "count": 2, **changed}
    call = ToolCall("buy", copy.deepcopy(arguments))
    seen = episode_of(tmp_path, Shop).step(call)
    if said is None:
        assert seen.content == "bought"
        assert len(SEEN) == 1
        assert call.arguments == arguments, "the call on record is as it was written"
    else:
        assert seen.is_error
        assert said in seen.content
        assert SEEN == []


def test_a_missing_argument_is_named(tmp_path: Path):
    seen = episode_of(tmp_path, Shop).step(ToolCall("buy", {"items": []}))
    assert seen.content == "Error: buy: missing a required argument: 'count'"
    unknown = episode_of(tmp_path, Shop).step(ToolCall("sell", {}))
    assert unknown.is_error


@pytest.mark.parametrize(
    ("schema", "fits", "does_not"),
    [
        ({"minimum": 0, "exclusiveMinimum": True}, 0.5, 0),
        ({"minimum": 0, "exclusiveMinimum": False}, 0, -1),
        ({"maximum": 9, "exclusiveMaximum": True, "minimum": 1}, 8, 9),
        ({"exclusiveMinimum": 0}, 0.5, 0),
        ({"type": "integer", "nullable": True}, None, "x"),
    ],
)
def test_limits_and_null_as_openapi_writes_them(schema: JsonValue, fits: JsonValue, does_not: JsonValue):
    parameters: JsonValue = {"type": "object", "properties": {"a": schema}}
    tool: ToolSchema = {"type": "function", "function": {"name": "t", "parameters": parameters}}
    assert wrong_arguments(tool, {"a": fits}) is None
    assert wrong_arguments(tool, {"a": does_not}) is not None


ODD_SCHEMAS = st.recursive(
    st.sampled_from(
        [None, True, 3, "integer", {"$ref": "#"}, {"$ref": "http://localhost:1/x"}, {"pattern": "("}, {}]
    ),
    lambda inner: st.dictionaries(
        st.sampled_from(
            ("type", "properties", "required", "enum", "items", "anyOf", "nullable", "minimum", "not", "a")
        ),
        inner | st.lists(inner, max_size=3),
        max_size=4,
    ),
    max_leaves=12,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(ODD_SCHEMAS, st.dictionaries(st.sampled_from(["a", "b"]), VALUES, max_size=2))
def test_no_schema_is_so_odd_that_the_check_raises(schema: JsonValue, arguments: dict[str, JsonValue]):
    before = copy.deepcopy(schema)
    tool: ToolSchema = {"type": "function", "function": {"name": "t", "parameters": schema}}
    said = wrong_arguments(tool, arguments)
    assert said is None or (isinstance(said, str) and len(said) < 400)
    assert schema == before


def test_values_of_any_size_and_depth_are_an_answer():
    deep: JsonValue = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, 10**6000, "x" * 1_000_000, {"a": {1: 2}}):
        tool = {"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}}
        said = wrong_arguments(tool, {"a": value})  # type: ignore[dict-item]
        assert said is None or len(said) < 400


NAMES = ("what", "function", "name", "args", "kwargs", "call", "instance", "timeout", "method")


def test_arguments_and_columns_have_any_names(tmp_path: Path):
    class Office(Quiet):
        def reset(self, **row: object) -> None:  # type: ignore[override]
            assert row == dict.fromkeys(NAMES, 1)

        def act(
            self,
            what: int,
            function: int,
            name: int,
            args: int,
            kwargs: int,
            call: int,
            instance: int,
            timeout: int,
            method: int,
        ) -> str:
            """Act.

            Args:
                what: It.
                function: It.
                name: It.
                args: It.
                kwargs: It.
                call: It.
                instance: It.
                timeout: It.
                method: It.
            """
            return "done"

    rows = [{"prompt": prompt, **dict.fromkeys(NAMES, 1)} for prompt in "ab"]
    seen = episode_of(tmp_path, Office, rows).step(ToolCall("act", dict.fromkeys(NAMES, 1)))
    assert seen.content == "done"
