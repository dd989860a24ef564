"""The grammar of a turn: what is read, what is well formed, and that nothing crashes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_rollout.chat.call_formats import HERMES, LLAMA, PHI, detect_call_format
from mosaic_rollout.chat.grammar import TAGS, parse_turn

CALL = '<tool_call>{"name": "read_file", "arguments": {"path": "a.txt"}}</tool_call>'
REFUSAL = '<tool_call>{"name": "refusal_tool", "arguments": {"reason": "harm"}}</tool_call>'


def test_plan_check_and_call_are_told_apart():
    turn = parse_turn(f"<think>read it</think><safety_thoughts>fine</safety_thoughts>{CALL}", HERMES)
    assert (turn.plan, turn.check, turn.action, turn.well_formed) == ("read it", "fine", "tool_call", True)
    assert turn.call is not None
    assert turn.call.arguments == {"path": "a.txt"}


def test_the_gate_may_stay_closed():
    turn = parse_turn(f"<think>read it</think>\n{CALL}\n", HERMES)
    assert turn.check is None
    assert turn.well_formed


def test_refusal_is_its_own_action():
    turn = parse_turn(f"<think>no</think>{REFUSAL}", HERMES)
    assert turn.action == "refusal"
    assert turn.call is not None
    assert turn.call.arguments["reason"] == "harm"


def test_plain_text_is_the_final_answer():
    turn = parse_turn("<think>done</think> All is sent. ", HERMES)
    assert (turn.action, turn.answer, turn.well_formed) == ("answer", "All is sent.", True)


def test_an_opened_think_may_lie_in_the_prompt():
    assert parse_turn("read it</think>Done.", HERMES, think_is_open=True).plan == "read it"
    assert not parse_turn("read it</think>Done.", HERMES).well_formed


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("", "malformed"),  # nothing
        ("<think>a</think>", "malformed"),  # no action
        ("<think>a", "malformed"),  # cut off inside the plan
        (f"<think>a</think>{CALL}{CALL}", "malformed"),  # two actions
        ('<think>a</think><tool_call>{"name": 3}</tool_call>', "malformed"),
        ("<think>a</think><tool_call>not json</tool_call>", "malformed"),
        ('<think>a</think><tool_call>{"name": "x"', "malformed"),  # a call that never closes
        (f"{CALL}", "tool_call"),  # readable, but without a plan
        (f"<think></think>{CALL}", "tool_call"),  # an empty plan
        (f"<think>a</think><think>b</think>{CALL}", "tool_call"),  # two plans
        (f"<safety_thoughts>c</safety_thoughts><think>a</think>{CALL}", "tool_call"),  # the wrong order
        (f"<think>a</think>so I say {CALL}", "tool_call"),  # text beside a call
        (f"<think>a</think><safety_thoughts></safety_thoughts>{CALL}", "tool_call"),  # an empty check
    ],
)
def test_what_breaks_the_grammar_is_read_but_not_well_formed(text: str, action: str):
    turn = parse_turn(text, HERMES)
    assert not turn.well_formed
    assert turn.action == action


@given(
    st.lists(
        st.sampled_from([*TAGS, "<tool_call>", "</tool_call>", "{", "}", '"name"', "a", " "]), max_size=12
    )
)
def test_no_text_crashes_the_parser(pieces: list[str]):
    turn = parse_turn("".join(pieces), HERMES)
    assert turn.action in ("tool_call", "refusal", "answer", "malformed")
    assert (turn.call is not None) == (turn.action in ("tool_call", "refusal"))


def test_each_family_writes_its_own_call():
    phi = '<think>a</think><|tool_call|>[{"name": "f", "arguments": {"x": 1}}]<|/tool_call|>'
    llama = '<think>a</think>{"name": "f", "parameters": {"x": 1}}'
    for text, call_format in ((phi, PHI), (llama, LLAMA)):
        turn = parse_turn(text, call_format)
        assert turn.well_formed
        assert turn.call is not None
        assert (turn.call.name, turn.call.arguments) == ("f", {"x": 1})


def test_a_template_shows_its_format():
    assert detect_call_format('<tool_call>\n{"name": "f"}\n</tool_call>') is HERMES
    assert detect_call_format('<|tool_call|>[{"name": "f"}]<|/tool_call|>') is PHI
    assert detect_call_format('{"name": "f", "parameters": {}}') is LLAMA
    assert detect_call_format("f(x)") is None
