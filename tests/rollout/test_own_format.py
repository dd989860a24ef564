"""rollout.call_format: one of ours by name, or a user's own, written by the template or by the loop."""

from __future__ import annotations

import pytest

from mosaic_rollout.chat import Chat
from mosaic_rollout.chat.call_formats import FORMATS, HERMES, PHI, CallFormat, read_call
from mosaic_rollout.chat.grammar import parse_turn
from mosaic_rollout.chat.own_format import load_call_format
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, Message, ToolCall
from tests.rollout.own_formats import Arrow
from tests.rollout.test_call_detection import CALLS, TOOL, template
from tests.rollout.tokenizers_for_tests import byte_tokenizer

OWN = "tests.rollout.own_formats:"
CALL = ToolCall("send", {"to": "ann"})


def test_every_format_has_its_name_and_auto_is_the_templates():
    assert load_call_format("auto") is None
    assert [load_call_format(one.name) for one in FORMATS] == list(FORMATS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hermez", "'hermez' is none of auto, hermes, phi, .*, nor your own as module:Class"),
        (OWN + "Nothing", "has no class 'Nothing'"),
        (OWN + "NoFormat", "must be a subclass of CallFormat"),
    ],
)
def test_a_name_of_no_format_is_refused(name: str, words: str):
    with pytest.raises(UserError, match=words):
        load_call_format(name)


def test_an_own_format_reads_turns():
    form = load_call_format(OWN + "Arrow")
    assert form is not None
    assert read_call(f"now {form.write(CALL)}", form) == CALL
    turn = parse_turn(f"<think>a</think>{form.write(CALL)}", form)
    assert turn.call == CALL


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Broken", r"parse failed: IndexError: no body \(.*own_formats\.py, line \d+\)"),
        ("Texts", "parse must give a ToolCall or None, not 'send"),
    ],
)
def test_what_an_own_format_does_wrong_is_said_in_one_line(name: str, words: str):
    form = load_call_format(OWN + name)
    assert form is not None
    with pytest.raises(UserError, match=words) as error:
        read_call(Arrow().write(CALL), form)
    assert "\n" not in str(error.value)


ARROW = load_call_format(OWN + "Arrow")
ARROWS = "=> {{ c.function.name }} {{ c.function.arguments | tojson }} <="


def opening(chat: Chat) -> str:
    """What a policy is shown that has made a call before."""
    calls: list[JsonValue] = [{"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}]
    messages: list[Message] = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "add", "content": "done"},
        {"role": "user", "content": "again"},
    ]
    return chat.decode(chat.prompt(messages, [TOOL])[0])


@pytest.mark.parametrize("form", [PHI, ARROW], ids=["phi", "own"])
def test_the_loop_teaches_a_format_that_the_template_does_not_write(form: CallFormat):
    """And writes earlier calls in it, as the policy is to."""
    chat = Chat(byte_tokenizer(template(CALLS[HERMES])), teach_loop=False, call_format=form)
    assert chat.call_format is form
    assert not chat.call_format_is_the_templates
    text = opening(chat)
    assert form.write(ToolCall("tool name", {"argument": "value"})) in text
    assert form.write(ToolCall("add", {"n": 1})) in text
    assert "<|im_start|>tools" not in text
    assert HERMES.marker not in text


def test_a_users_format_reads_a_template_that_ours_do_not():
    assert ARROW is not None
    tokenizer = byte_tokenizer(template(ARROWS))
    assert Chat(tokenizer, teach_loop=False).call_format is HERMES
    chat = Chat(tokenizer, teach_loop=False, call_format=ARROW)
    assert chat.call_format is ARROW
    assert chat.call_format_is_the_templates
    assert "<|im_start|>tools" in opening(chat)
    assert ARROW.write(ToolCall("add", {"n": 1})) in opening(chat)
