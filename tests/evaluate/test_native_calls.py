"""Calls and thoughts that a server parsed out of the text: read whole, or malformed; undone for the loop."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_rollout.chat.call_formats import HERMES
from mosaic_rollout.chat.grammar import begins_in_plan, parse_turn
from mosaic_rollout.endpoint.client import NativeCall, _reply
from mosaic_rollout.endpoint.server import read_completion
from mosaic_rollout.loop.chat_agent import _parsed, _written
from mosaic_rollout.types import JsonValue, ToolCall
from tests.rollout.calls_for_tests import drawn_call, hostile_text


def reply(**message: object):
    return _reply(read_completion(json.dumps({"choices": [{"message": message}]})))


def called(**function: object) -> NativeCall:
    return reply(tool_calls=[{"id": "1", "function": {"name": "delete", **function}}]).calls[0]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ({"arguments": '{"path": "x"}'}, {"path": "x"}),
        ({"arguments": {"path": "x"}}, {"path": "x"}),
        ({"arguments": "{}"}, {}),
        ({"arguments": {}}, {}),
        ({}, None),
        ({"arguments": None}, None),
        ({"arguments": ""}, None),
        ({"parameters": {"path": "x"}}, None),
        ({"arguments": "[1]"}, None),
        ({"arguments": [1]}, None),
        ({"arguments": 3}, None),
        ({"arguments": '{"path": '}, None),
        ({"arguments": '{"path": "x", "path": "y"}'}, None),
        ({"arguments": '"{\\"path\\": \\"x\\"}"'}, None),
        ({"arguments": '{}}</tool_call>\n{"x": {}'}, None),
        ({"arguments": '{}, "name": "read"'}, None),
    ],
)
def test_arguments_are_read_or_the_turn_is_malformed(
    function: dict[str, object], arguments: dict[str, JsonValue] | None
):
    native = called(**function)
    turn = parse_turn(f"<think>a</think>{_written(native)}", HERMES)
    if arguments is None:
        assert _parsed(native) is None
        assert turn.action == "malformed"
    else:
        assert _parsed(native) == turn.call == ToolCall("delete", arguments)


@given(st.integers(0, 2**32))
def test_a_server_that_parses_changes_nothing(seed: int):
    """Whatever is in thought and arguments: plan and call are those of the text that it took apart."""
    random = Random(seed)
    call, thought = drawn_call(random), hostile_text(random)
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    answer = reply(reasoning_content=thought or None, content=None, tool_calls=[{"function": function}])
    assert _parsed(answer.calls[0]) == call
    text = answer.text + _written(answer.calls[0])
    turn = parse_turn(text, HERMES, think_is_open=begins_in_plan(text, HERMES))
    assert turn.call == call
    assert (turn.plan or "").replace("< /think>", "</think>") == thought.strip()
    assert turn.check is None


def test_a_thought_is_put_back_once():
    for content, thought, text in [
        ("Done.", "look", "<think>look</think>Done."),
        ("<think>look</think>Done.", "look", "<think>look</think>Done."),
        ("look</think>Done.", "look", "look</think>Done."),
        ("<think>plan</think>Done.", "at length", "<think>plan</think>Done."),
        ("A thought ends with </think>.", "look", "<think>look</think>A thought ends with </think>."),
        ("Done.", "it ends with </think>", "<think>it ends with < /think></think>Done."),
        ("Done.", None, "Done."),
    ]:
        assert reply(content=content, reasoning_content=thought).text == text


def test_a_tag_in_an_argument_opens_no_plan():
    text = HERMES.write(ToolCall("write", {"text": "a</think>b"}))
    assert not begins_in_plan(text, HERMES)
    assert begins_in_plan(f"look</think>{text}", HERMES)
