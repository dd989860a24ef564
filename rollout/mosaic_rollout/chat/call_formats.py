"""How the model families write a tool call, and which of the ways a chat template uses.

A template's format is found by having it write calls and reading them back.

| format | read as | used by |
|---|---|---|
| hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` | Qwen2.5, Qwen3; taught to others |
| phi | `<|tool_call|>[{"name": ..., "arguments": {...}}]<|/tool_call|>` | Phi-4-mini |
| llama | the whole action is `{"name": ..., "parameters": {...}}` | Llama 3.1 and later |
| xlam | the whole action is `[{"name": ..., "arguments": {...}}]` | xLAM |
| mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}]` | Mistral |
| qwen3-coder | `<tool_call><function=name><parameter=key>text</parameter></function></tool_call>` | itself |
| pythonic | the whole action is `[name(key="value")]` | ToolACE, Llama 3.2's model card |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from mosaic_rollout.chat.json_calls import BareJson, MarkedJson
from mosaic_rollout.chat.python_calls import PythonCalls
from mosaic_rollout.chat.written_call import CallFormat, WrittenCall
from mosaic_rollout.chat.xml_calls import XmlCalls
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, Message, ToolCall, ToolSchema

__all__ = [
    "FORMATS",
    "HERMES",
    "LLAMA",
    "MISTRAL",
    "PHI",
    "PYTHONIC",
    "QWEN3_CODER",
    "XLAM",
    "CallFormat",
    "WrittenCall",
    "detect_call_format",
    "read_call",
]

HERMES = MarkedJson("hermes", "<tool_call>", "</tool_call>")
"""Also what a model is taught whose template writes no calls, or none that are read."""
PHI = MarkedJson("phi", "<|tool_call|>", "<|/tool_call|>", as_list=True)
MISTRAL = MarkedJson("mistral", "[TOOL_CALLS]", None, as_list=True)
QWEN3_CODER = XmlCalls("qwen3-coder", "<tool_call>")
LLAMA = BareJson("llama", "", "parameters")
XLAM = BareJson("xlam", "", "arguments", as_list=True)
PYTHONIC = PythonCalls("pythonic", "")

FORMATS: tuple[CallFormat, ...] = (HERMES, PHI, MISTRAL, QWEN3_CODER, LLAMA, XLAM, PYTHONIC)


def read_call(text: str, call_format: CallFormat, tools: Sequence[ToolSchema] = ()) -> ToolCall | None:
    """The one call in an action's text; None where there is none, several, or a broken one."""
    calls = call_format.find(text)
    if len(calls) != 1 or not calls[0].complete:
        return None
    return call_format.parse(calls[0].body, tools)


def detect_call_format(rendered_call: str, formats: Sequence[CallFormat] = FORMATS) -> CallFormat | None:
    """The format that reads one call in an assistant's action as its template wrote it; None if none does.

    >>> detect_call_format('<tool_call>{"name": "f", "arguments": {}}</tool_call>').name
    'hermes'
    """
    found: list[CallFormat] = []
    for call_format in formats:
        call = read_call(rendered_call, call_format)
        if call is not None:
            found.append(call_format)
            if rendered_call.lstrip()[:1] == call_format.write(call)[:1]:  # a list, or an object
                return call_format
    return found[0] if found else None


Render: TypeAlias = Callable[[Sequence[Message], Sequence[ToolSchema]], str]
"""The chat template: messages and tools to text. UserError where it refuses them."""
Written: TypeAlias = Callable[[ToolCall], Sequence[Message]]
"""A message that makes a call, as the template takes it, and what has to follow it."""

_WORD = "mosaicprobe"
_USER: Message = {"role": "user", "content": "x"}
_Argument: TypeAlias = tuple[JsonValue, JsonValue]  # its type as a schema says it, and a value
_ARGUMENTS: dict[str, _Argument] = {
    "text": ("string", "é {\"a\": 'b'} \\ 漢\n1"),
    "digits": ("string", "12"),
    "count": ("integer", -3),
    "share": ("number", 0.5),
    "sure": ("boolean", True),
    "nothing": (["string", "null"], None),
    "items": ("array", [1, "é", {"k": []}]),
    "nested": ("object", {"a": {"b": "c"}}),
}
"""An argument a type that JSON has, and what a template might escape, convert or quote."""
_WITHOUT_NULL = {key: argument for key, argument in _ARGUMENTS.items() if isinstance(argument[0], str)}
"""For templates that cannot write a schema with a list of types, as Hermes' do."""


def format_of_template(
    render: Render, written: Written, endings: Sequence[str], formats: Sequence[CallFormat] = FORMATS
) -> CallFormat | None:
    """The format in which a template writes calls; None where it writes none, or none that is read here.

    It counts as read where every call that the template is given comes back as it was given: arguments of
    every type, nested, with quotes and other letters than ASCII's, and none at all.
    endings: texts that end a turn, which a template writes behind a call. formats: those that it may be.
    """
    for arguments in (_ARGUMENTS, _WITHOUT_NULL):
        try:
            render([_USER], [_probe(arguments)])
        except UserError:
            continue
        return _format_of_calls(render, written, endings, arguments, formats)
    return None


def _format_of_calls(
    render: Render,
    written: Written,
    endings: Sequence[str],
    arguments: Mapping[str, _Argument],
    formats: Sequence[CallFormat],
) -> CallFormat | None:
    found: CallFormat | None = None
    probe = _probe(arguments)
    for call in (ToolCall(_WORD, {key: value for key, (_, value) in arguments.items()}), ToolCall(_WORD, {})):
        actions = list(_actions(render, written(call), endings, probe))
        if found is None:
            named = (detect_call_format(action, formats) for action in actions)
            found = next((one for one in named if one is not None), None)
        if found is None or not any(_same(read_call(action, found, [probe]), call) for action in actions):
            return None
    return found


def _probe(arguments: Mapping[str, _Argument]) -> ToolSchema:
    properties: dict[str, JsonValue] = {key: {"type": kind} for key, (kind, _) in arguments.items()}
    parameters: JsonValue = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": _WORD, "description": _WORD, "parameters": parameters}}


def _actions(
    render: Render, said: Sequence[Message], endings: Sequence[str], probe: ToolSchema
) -> Iterator[str]:
    """The template's rendering of a call, cut to what may be the action."""
    try:
        text = render([_USER, *said], [probe])
        plain = render([_USER, {"role": "assistant", "content": _WORD}], [probe])
        asked = render([_USER], [probe])
    except UserError:
        return
    before, _, after = plain.rpartition(_WORD)
    for start in sorted({_common(text, before), _common(text, asked)}, reverse=True):
        action = text[start:]
        yield action
        for ending in (after.strip(), *endings):
            if ending and ending in action:
                yield action.partition(ending)[0]


def _same(read: ToolCall | None, given: ToolCall) -> bool:
    """Equal, and of equal types: 1 and True are not the same."""
    return read is not None and repr(read) == repr(ToolCall(given.name, _in_order(read, given)))


def _in_order(read: ToolCall, given: ToolCall) -> dict[str, JsonValue]:
    """The arguments that were given, in the order in which they were read; templates may sort them."""
    if read.arguments.keys() != given.arguments.keys():
        return given.arguments
    return {key: given.arguments[key] for key in read.arguments}


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
