"""Turns as messages: whole, and in the pieces in which a stream tells them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_rollout.chat.call_formats import FORMATS, HERMES, LLAMA, CallFormat
from mosaic_rollout.serving.answer import read_answer, settled
from mosaic_rollout.types import ToolCall

CALL = ToolCall("read", {"path": "a </think> b"})
PIECES = st.sampled_from(
    [
        *("<think>", "</think>", "<safety_thoughts>", "</safety_thoughts>", "<tool_call>", "</tool_call>"),
        *("<", "</", "think>", " ", "\n", "{", "[", "<|", "a plan", "so", "é", '{"name": "read"}', "CALL"),
    ]
)


def read(text: str, call_format: CallFormat = HERMES, *, opened: bool = False, own: bool = False):
    return read_answer(text, call_format, think_is_open=opened, tools=(), refusal_is_a_tool=own)


@settings(max_examples=150)
@given(st.lists(PIECES, max_size=9), st.sampled_from(FORMATS), st.booleans())
def test_what_a_stream_has_told_is_the_beginning_of_the_whole(
    pieces: list[str], call_format: CallFormat, opened: bool
):
    text = "".join(call_format.write(CALL) if piece == "CALL" else piece for piece in pieces)
    answer = read(text, call_format, opened=opened)
    for end in range(len(text) + 1):
        plan, content = settled(text[:end], call_format, think_is_open=opened)
        assert (answer.plan or "").startswith(plan)
        assert (answer.content or "").startswith(content)


def test_a_plan_and_a_text_are_settled_as_they_come():
    text = "<think>look at it</think><safety_thoughts>fine</safety_thoughts>It is a < b, I say"
    assert settled(text[:15], HERMES, think_is_open=False) == ("look at", "")
    assert settled(text, HERMES, think_is_open=False) == ("look at it", "It is a < b, I say")
    assert settled("Well, {not a call}", LLAMA, think_is_open=False) == ("", "Well, {not a call}")


@pytest.mark.parametrize(
    ("text", "plan", "check", "content", "calls"),
    [
        ("<think>a</think><safety_thoughts>b</safety_thoughts>hi", "a", "b", "hi", []),
        ("hi", None, None, "hi", []),
        ("<think>never ended", "never ended", None, None, []),
        (f"<think>a</think>first {HERMES.write(CALL)}", "a", None, "first", ["read"]),
        (f"{HERMES.write(CALL)}\n{HERMES.write(CALL)}", None, None, None, ["read", "read"]),
        ('<tool_call>{"name": 3}</tool_call>', None, None, '<tool_call>{"name": 3}</tool_call>', []),
        ("", None, None, None, []),
    ],
)
def test_the_parts_of_a_turn(text: str, plan: str, check: str, content: str, calls: list[str]):
    answer = read(text)
    assert (answer.plan, answer.check, answer.content) == (plan, check, content)
    assert [call.name for _, call in answer.calls] == calls
    assert len({name for name, _ in answer.calls}) == len(calls)


def test_a_refusal_is_openais_where_the_client_has_no_such_tool():
    text = HERMES.write(ToolCall("refusal_tool", {"reason": "no consent"}))
    assert read(text).message()["refusal"] == "no consent"
    assert "tool_calls" not in read(text).message()
    assert [call.name for _, call in read(text, own=True).calls] == ["refusal_tool"]
