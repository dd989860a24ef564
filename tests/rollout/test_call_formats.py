"""Call formats: what each writes is read back, whatever its arguments hold; what is not read is refused."""

import json
import re
from collections.abc import Sequence
from random import Random
from typing import SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_rollout.chat import json_calls
from mosaic_rollout.chat import xml_calls as xml_calls
from mosaic_rollout.chat.call_formats import (
    FORMATS,
    HERMES,
    LLAMA,
    MISTRAL,
    PHI,
    PYTHONIC,
    QWEN3_CODER,
    XLAM,
    CallFormat,
)
from mosaic_rollout.chat.grammar import TAGS, parse_turn
from mosaic_rollout.types import JsonValue, ToolCall, ToolSchema
from tests.rollout.calls_for_tests import MARKS, can_be_written, drawn_call, hostile_text, schema_of

each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
seeds = st.integers(0, 2**32)


def same(call: ToolCall | None, expected: ToolCall) -> bool:
    """Compared as JSON, where 1, 1.0 and true differ."""
    return (
        call is not None
        and call.name == expected.name
        and json.dumps(call.arguments, sort_keys=True) == (json.dumps(expected.arguments, sort_keys=True))
    )


@each_format
@given(seed=seeds, blank=st.sampled_from(["", "\n", "\n\n "]), checked=st.booleans())
def test_a_written_call_is_read_back_in_every_turn(form: CallFormat, seed: int, blank: str, checked: bool):
    random = Random(seed)
    call = drawn_call(random)
    if not can_be_written(call, form):
        return
    written, tools = form.write(call), [schema_of(call)]
    action = "refusal" if call.name == "refusal_tool" else "tool_call"
    check = "<safety_thoughts>fine</safety_thoughts>" if checked else ""
    head = f"<think>look</think>{check}"
    turn = parse_turn(f"{head}{blank}{written}{blank}", form, tools=tools)
    assert same(turn.call, call)
    assert (turn.action, turn.plan, turn.check) == (action, "look", "fine" if checked else None)
    assert turn.well_formed
    assert turn.plan_span == (0, len("<think>look</think>"))
    assert turn.check_span == ((len("<think>look</think>"), len(head)) if checked else None)
    opened = parse_turn(f"look</think>{check}{written}", form, think_is_open=True, tools=tools)
    assert opened.well_formed
    assert same(opened.call, call)
    for text, is_open in ((written, False), (written, True)):  # without a plan, even where one was opened
        turn = parse_turn(text, form, think_is_open=is_open, tools=tools)
        assert same(turn.call, call)
        assert (turn.plan, turn.check, turn.plan_span, turn.check_span) == (None, None, None, None)
        assert not turn.well_formed
    if form.marker:
        turn = parse_turn(f"<think>it never ends {written}", form, tools=tools)
        assert same(turn.call, call)
        assert (turn.plan, turn.check) == (None, None)


@each_format
@given(seed=seeds)
def test_a_call_in_a_plan_is_a_thought(form: CallFormat, seed: int):
    random = Random(seed)
    thought, call = drawn_call(random), drawn_call(random)
    tools = [schema_of(thought), schema_of(call)][: 1 if thought.name == call.name else 2]
    if thought.name == call.name or not form.marker or form is MISTRAL:
        return
    if not (can_be_written(thought, form) and can_be_written(call, form)):
        return
    plan = f"I may write {form.write(thought)} or not"
    turn = parse_turn(f"<think>{plan}</think>{form.write(call)}", form, tools=tools)
    assert same(turn.call, call)
    assert turn.plan == plan
    assert turn.well_formed == (not any(tag in plan for tag in TAGS))


@each_format
@given(seed=seeds)
def test_two_calls_are_malformed_and_a_call_between_tags_out_of_place_is(form: CallFormat, seed: int):
    call = drawn_call(Random(seed))
    if not can_be_written(call, form):
        return
    written = form.write(call)
    assert parse_turn(f"<think>a</think>{written}{written}", form).action == "malformed"
    assert parse_turn(f"<think>a</think>{written}\n{written}", form).action == "malformed"
    for opens, closes in (("<think>", "</think>"), ("<safety_thoughts>", "</safety_thoughts>")):
        turn = parse_turn(f"<think>a</think>so {opens}maybe {written}{closes} no", form)
        assert turn.call is None


@each_format
@given(seed=seeds, is_open=st.booleans())
def test_no_soup_of_tokens_raises_and_spans_are_of_blocks(form: CallFormat, seed: int, is_open: bool):
    random = Random(seed)
    text = hostile_text(random, 40)
    if random.random() < 0.5:
        text = f"<think>a</think>{form.write(drawn_call(random))}"
        place = random.randrange(len(text))
        text = text[:place] + hostile_text(random, 4) + text[place + random.randrange(4) :]
    turn = parse_turn(text, form, think_is_open=is_open)
    assert (turn.call is not None) == (turn.action in ("tool_call", "refusal"))
    assert (turn.answer is not None) == (turn.action == "answer")
    blocks = (
        (turn.plan_span, turn.plan, "" if is_open else "<think>", "</think>"),
        (turn.check_span, turn.check, "<safety_thoughts>", "</safety_thoughts>"),
    )
    for span, inner, opens, closes in blocks:
        assert (span is None) == (inner is None)
        if span is not None:
            block = text[span[0] : span[1]]
            assert block.startswith(opens)
            assert block.endswith(closes)
            assert block[len(opens) : -len(closes)].strip() == inner
            assert span[1] <= turn.action_start
    if turn.well_formed:
        assert turn.plan
        assert turn.action_start == max(span[1] for span in (turn.plan_span, turn.check_span) if span)


class Counted(str):
    """A text that counts the characters its searches look at."""

    looked = 0

    def find(self, *args: object) -> int:
        found = super().find(*args)  # pyrefly: ignore [bad-argument-type]
        start = args[1] if len(args) > 1 and isinstance(args[1], int) else 0
        Counted.looked += (len(self) if found < 0 else found) - min(start, len(self))
        return found

    def __getitem__(self, key: SupportsIndex | slice) -> "Counted":
        return Counted(super().__getitem__(key))


class CountedPattern:
    """A pattern that counts the characters it looks at."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern

    def search(self, text: str, start: int = 0) -> re.Match[str] | None:
        found = self._pattern.search(text, start)
        Counted.looked += (len(text) if found is None else found.end()) - start
        return found


def _cost(text: str, form: CallFormat, monkeypatch: pytest.MonkeyPatch) -> int:
    read = json_calls.read_json_at

    def counted(text: str, start: int, **options: bool) -> tuple[JsonValue, int]:
        try:
            found = read(text, start, **options)
        except ValueError:
            Counted.looked += len(text) - start
            raise
        Counted.looked += found[1] - start
        return found

    Counted.looked = 0
    with monkeypatch.context() as patch:
        patch.setattr(json_calls, "read_json_at", counted)
        patch.setattr(xml_calls, "_VALUE_ENDS", CountedPattern(xml_calls._VALUE_ENDS))
        parse_turn(Counted(text), form)
    return Counted.looked


SOUPS = [
    *MARKS,
    *("<tool_call>{", '<tool_call>{"a":', '<tool_call>["', "<tool_call><function=f><parameter=x>"),
    *('<tool_call>{"name":"f","arguments":{"x":"</think>"}}</tool_call>', "<tool_call>{}</tool_call>"),
    *(
        '[TOOL_CALLS][{"a":1}] ',
        '<|tool_call|>{"a": "</think>"',
        "</parameter></function>",
        '{"a":[',
        "[f(x=[",
    ),
    *("<think><safety_thoughts>", "</think></safety_thoughts>", "<tool_call></think>", '""" ', "f(x='"),
]


@each_format
def test_the_work_is_linear_in_the_text_whatever_it_is(form: CallFormat, monkeypatch: pytest.MonkeyPatch):
    """Of 8,000 characters of one piece, in each place of a turn, none on average is looked at forty times."""
    for piece in SOUPS:
        for before in ("", "<think>", "<think>a</think>", "<think>a</think><safety_thoughts>"):
            text = before + piece * (8000 // len(piece)) + before.replace("<", "</")
            assert _cost(text, form, monkeypatch) < 40 * len(text), (piece, before)


# ---- which objects are calls


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', {"x": 1}),
        ('{"arguments": {"x": 1}, "name": "f"}', {"x": 1}),
        ('{"parameters": {"x": 1}, "name": "f"}', {"x": 1}),
        ('[{"name": "f", "parameters": {"x": 1}}]', {"x": 1}),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', {"x": 1}),
        ('{"id": "1", "type": "function", "name": "f", "arguments": {"x": 1}}', {"x": 1}),
        ('{"type": "function", "function": {"arguments": {"x": 1}, "name": "f"}}', {"x": 1}),
        ('{"id": 3, "function": {"name": "f", "parameters": {"x": 1}}}', {"x": 1}),
        ('{"name": "f", "args": {"x": 1}}', None),
        ('{"name": "f", "input": {"x": 1}}', None),
        ('{"name": "f", "x": 1}', None),
        ('{"name": "f", "arguments": {"x": 1}, "parameters": {"x": 1}}', None),
        ('{"name": "f", "arguments": {"x": 1}, "y": 2}', None),
        ('{"name": "f", "arguments": {"x": 1}, "arguments": {}}', None),
        ('{"name": "f", "arguments": {"x": 1, "x": 2}}', None),
        ('{"name": "f", "arguments": "{\\"x\\": 1, \\"x\\": 2}"}', None),
        ('{"name": "f", "arguments": "x"}', None),
        ('{"name": "f", "arguments": null}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": 1, "arguments": {"x": 1}}', None),
        ('{"type": "retrieval", "name": "f", "arguments": {"x": 1}}', None),
        ('{"function": {"name": "f", "arguments": {"x": 1}}, "arguments": {}}', None),
        ('{"function": "f", "arguments": {"x": 1}}', None),
        ('{"tool": "f", "arguments": {"x": 1}}', None),
        ('{"tool_name": "f", "parameters": {"x": 1}}', None),
        ('[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]', None),
    ],
)
def test_arguments_are_read_or_the_turn_is_malformed(body: str, arguments: dict[str, JsonValue] | None):
    marked = (f"<tool_call>{body}</tool_call>", f"<|tool_call|>{body}<|/tool_call|>", f"[TOOL_CALLS]{body}")
    forms: Sequence[tuple[CallFormat, str]] = [*zip((HERMES, PHI, MISTRAL), marked, strict=True)]
    for form, text in [*forms, (LLAMA, body), (LLAMA, f"<|python_tag|>{body}"), (XLAM, body)]:
        turn = parse_turn(f"<think>a</think>{text}", form)
        if arguments is not None:
            assert turn.call == ToolCall("f", arguments), text
        elif form.marker or text.startswith("<|python_tag|>"):
            assert turn.action == "malformed", text
        else:
            assert turn.action in ("malformed", "answer"), text
            assert turn.action == "malformed" or not re.search('args|input|arguments": .x', text), text


def test_no_arguments_at_all_are_an_empty_object_where_a_marker_says_that_it_is_a_call():
    assert parse_turn('<think>a</think><tool_call>{"name": "f"}</tool_call>', HERMES).call == ToolCall(
        "f", {}
    )
    assert parse_turn('<think>a</think><|python_tag|>{"name": "f"}', LLAMA).call == ToolCall("f", {})
    assert parse_turn('<think>a</think>{"name": "f"}', LLAMA).answer == '{"name": "f"}'


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "Ann", "age": 3}',
        '{"total": 7}',
        '{"result": {"name": "f", "arguments": {}}}',
        "[1, 2, 3]",
        '[{"name": "Ann"}, {"name": "Bob"}]',
        'Write {"name": "f", "parameters": {"x": 1}} to call it.',
        'For example:\n```json\n{"name": "f", "arguments": {"x": 1}}\n```',
        '{"name": "f"',
        "{not JSON}",
        "[see note 1]",
        "[sin(x), cos(x)]",
        "[link](https://example.org/?a=1)",
    ],
)
def test_an_answer_that_happens_to_be_json_is_an_answer(answer: str):
    for form in (LLAMA, XLAM, PYTHONIC):
        turn = parse_turn(f"<think>a</think>{answer}", form)
        assert (turn.action, turn.answer, turn.well_formed) == ("answer", answer, True)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (LLAMA, '{"name": "f", "parameters": {"x": 1}'),
        (LLAMA, '{"name": "f", "parameters": {"x": 1}} done'),
        (LLAMA, '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}'),
        (LLAMA, "{'name': 'f', 'parameters': {'x': 1}}"),
        (LLAMA, "<|python_tag|>f.call(x=1)"),
        (XLAM, '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'),
        (XLAM, '[{"name": "f", "arguments": {"x": 1}'),
        (PYTHONIC, "[f(a=1), g(a=1)]"),
        (PYTHONIC, "[f(a=1)"),
        (PYTHONIC, "[f(a=1, a=2)]"),
        (PYTHONIC, "[f(a=1, b)]"),
        (PYTHONIC, "[f(a=open('x'))]"),
        (PYTHONIC, "[f(a=1 + 1)]"),
        (PYTHONIC, '[f(a=f"{x}")]'),
        (PYTHONIC, "[f(a={1: 2})]"),
        (PYTHONIC, f"[f(a={'[' * 5000}{']' * 5000})]"),
        (PYTHONIC, f"[f(a={'9' * 5000})]"),
        (PYTHONIC, '[f(a="\\U00110000")]'),
        (PYTHONIC, "[f(a=1)] done"),
        (PYTHONIC, '[f("x")]'),
        (PYTHONIC, "[ f( 'x', a=1)]"),
        (PYTHONIC, '[f({"a": 1})]'),
        (PYTHONIC, '[f(**{"a": 1})]'),
        (PYTHONIC, "[f(zip=02139)]"),
        (QWEN3_CODER, "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>"),
        (QWEN3_CODER, "<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"),
        (QWEN3_CODER, "<tool_call>\n<function=f>\n<parameter=x>\n1\n</function>\n</tool_call>"),
        (
            QWEN3_CODER,
            "<tool_call><function=f><parameter=x>1</parameter><parameter=x>2</parameter>"
            "</function></tool_call>",
        ),
        (QWEN3_CODER, "<tool_call><function=f></function></tool_call> done"),
        (QWEN3_CODER, '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        (HERMES, "<tool_call><function=f></function></tool_call>"),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}'),
        (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>'),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}}] done'),
    ],
)
def test_what_begins_as_a_call_and_is_none_is_malformed(form: CallFormat, text: str):
    assert parse_turn(f"<think>a</think>{text}", form).action == "malformed"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("[f()]", {}),
        ("[f(a=1, b=-2.5, c=None, d=null, e=[True, false, ()], g={'k': 'v',},)]", None),
        ("[ f( a = 'x' \"y\" ) ]", {"a": "xy"}),
        ('[f(a="""one "quoted"\nline""")]', {"a": 'one "quoted"\nline'}),
        (r"[f(a='\x41\u00e9\101\n\d\'')]", {"a": "AéA\n\\d'"}),
        (r"[f(a='\ud83d\ude00')]", {"a": "😀"}),
        (r"[f(a='\ud83d')]", {"a": "\ufffd"}),
        ("[f(a=[f(b=1)])]", "malformed"),
    ],
)
def test_python_literals(text: str, arguments: dict[str, JsonValue] | None):
    turn = parse_turn(f"<think>a</think>{text}", PYTHONIC)
    if arguments == "malformed":
        assert turn.action == "malformed"
        return
    expected: dict[str, JsonValue] = {
        "a": 1,
        "b": -2.5,
        "c": None,
        "d": None,
        "e": [True, False, []],
        "g": {"k": "v"},
    }
    assert turn.call == ToolCall("f", expected if arguments is None else arguments)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("1", {"type": "string"}, "1"),
        ("1", {"type": "integer"}, 1),
        ("1", {"type": "number"}, 1),
        ("1.5", {"type": "integer"}, "1.5"),  # the tool's own check says what is wrong
        ("True", {"type": "boolean"}, True),
        ("1", {"type": "boolean"}, "1"),
        ("null", {"type": "string"}, "null"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"type": "integer", "nullable": True}, None),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("{'a': True}", {"type": "object"}, {"a": True}),
        ("7", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
        ("7", {"enum": ["7", "8"]}, "7"),
        ("7", {"const": "7"}, "7"),
        ("7", {"$ref": "#/$defs/Floor"}, "7"),
        ("7", {"allOf": [{"$ref": "#/$defs/Floor"}], "default": "1"}, "7"),
        ("null", {"anyOf": [{"$ref": "#/$defs/Floor"}, {"type": "null"}]}, None),
        ("7", {"$ref": "#/$defs/Ring"}, 7),
        ("7", {"$ref": "#/$defs/Nowhere"}, 7),
        ("7", {"description": "d"}, 7),
        ("7", None, 7),
        ("07", None, "07"),
        ('"7"', None, '"7"'),
        ("True", None, "True"),
        ('{"a": 1}', None, {"a": 1}),
        ('{"a":1}', None, {"a": 1}),
        ('{"a" : 1}', None, '{"a" : 1}'),
    ],
)
def test_xml_values_are_of_the_types_that_the_schema_says(text: str, schema: JsonValue, value: JsonValue):
    properties: dict[str, JsonValue] = {} if schema is None else {"x": schema}
    defined: JsonValue = {"Floor": {"type": "string", "enum": ["7"]}, "Ring": {"$ref": "#/$defs/Ring"}}
    parameters: JsonValue = {"properties": properties, "$defs": defined}
    tool: ToolSchema = {"function": {"name": "f", "parameters": parameters}}
    written = f"<tool_call>\n<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>\n</tool_call>"
    turn = parse_turn(f"<think>a</think>{written}", QWEN3_CODER, tools=[tool])
    assert same(turn.call, ToolCall("f", {"x": value}))
    assert turn.well_formed
