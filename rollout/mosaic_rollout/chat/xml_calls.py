"""Calls in the XML of Qwen3-Coder and Qwen3.5: `<function=name>` with a `<parameter=name>` an argument."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mosaic_rollout.chat.python_calls import read_literal
from mosaic_rollout.chat.written_call import CallFormat, WrittenCall, skip_blank
from mosaic_rollout.plain_json import read_json
from mosaic_rollout.types import JsonValue, ToolCall, ToolSchema

_FUNCTION = "<function="
_DEEPEST = 8  # schemas within schemas; references may go round in a ring
_OPENS = re.compile(r"<tool_call>\s*+(?=<function=)")
_NAME = re.compile(r"\s*+<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"\s*+<parameter=([^<>\n]+)>")
_VALUE_ENDS = re.compile(r"</parameter>(?=\s*+(?:<parameter=[^<>\n]+>|</function>\s*+(?:</tool_call>|\Z)))")
_FUNCTION_ENDS = re.compile(r"\s*+</function>")
_CALL_ENDS = re.compile(r"\s*+</tool_call>")


@dataclass(frozen=True)
class XmlCalls(CallFormat):
    """A function and its parameters as tags. Values are bare text: nothing in them is escaped.

    A value ends at a `</parameter>` that another parameter or the call's end follows, so tags within it are
    its own. One that holds this very sequence cannot be written in the format: it ends there, and what comes
    after it is another parameter, or makes the turn malformed.
    """

    def at(self, text: str, start: int) -> WrittenCall | None:
        opened = _OPENS.match(text, start)
        if opened is None:
            return None
        ends = _function_end(text, opened.end())
        closed = _CALL_ENDS.match(text, ends) if ends is not None else None
        if ends is None or closed is None:
            return None
        return WrittenCall(start, closed.end(), text[opened.end() : ends])

    def find(self, text: str) -> list[WrittenCall]:
        calls = super().find(text)
        if not calls:
            start = text.find(_FUNCTION)  # without the tag around it, as the model sometimes writes
            return [] if start < 0 else [WrittenCall(start, len(text), text[start:], complete=False)]
        last = calls[-1]
        if last.complete and skip_blank(text, last.end) < len(text):
            calls[-1] = WrittenCall(last.start, len(text), last.body, complete=False)
        return calls

    def parse(self, body: str, tools: Sequence[ToolSchema] = ()) -> ToolCall | None:
        named = _NAME.match(body)
        if named is None or _function_end(body, 0) != len(body.rstrip()):
            return None
        name, position = named[1].strip(), named.end()
        parameters = _parameters(name, tools)
        properties = parameters.get("properties")
        schemas = properties if isinstance(properties, Mapping) else {}
        arguments: dict[str, JsonValue] = {}
        while (opened := _PARAMETER.match(body, position)) is not None:
            ended = _VALUE_ENDS.search(body, opened.end())
            key = opened[1].strip()
            if ended is None or key in arguments:
                return None
            value = body[opened.end() : ended.start()]
            value = value.removeprefix("\n").removesuffix("\n")
            arguments[key] = typed(value, schemas.get(key), parameters)
            position = ended.end()
        return ToolCall(name, arguments)

    def write(self, call: ToolCall) -> str:
        parameters = "".join(
            f"<parameter={key}>\n{_written(value)}\n</parameter>\n" for key, value in call.arguments.items()
        )
        return f"<tool_call>\n<function={call.name}>\n{parameters}</function>\n</tool_call>"


def typed(text: str, schema: JsonValue, within: JsonValue = None) -> JsonValue:
    """The value that a parameter's text is by its JSON schema; the text itself where it is not of that type.

    Without a schema, or by one that says no type, a text that is JSON just as JSON is written is that value.
    within: the schema of all parameters, whose definitions a `$ref` names.

    >>> typed("1", {"type": "string"}), typed("1", {"type": "integer"}), typed("1", None), typed("01", None)
    ('1', 1, 1, '01')
    """
    kinds = _kinds(schema, within)
    if "null" in kinds and text in ("null", "None"):
        return None
    if "string" in kinds:
        return text
    if not kinds:
        value = _read(text)
        same = (
            json.dumps(value, ensure_ascii=False),
            json.dumps(value, ensure_ascii=False, separators=(",", ":")),
        )
        return value if text in same and not isinstance(value, str) else text
    value = _read(text.strip())
    fits = (
        (isinstance(value, bool) and "boolean" in kinds)
        or (isinstance(value, int) and not isinstance(value, bool) and bool(kinds & {"integer", "number"}))
        or (isinstance(value, float) and "number" in kinds)
        or (isinstance(value, list) and "array" in kinds)
        or (isinstance(value, dict) and "object" in kinds)
    )
    return value if fits else text


def _read(text: str) -> JsonValue:
    """A text as JSON, or as Python, in which templates write what is no text; else the text."""
    for read in (lambda: read_json(text, unique_keys=True), lambda: read_literal(text)):
        try:
            return read()
        except ValueError:
            continue
    return text


def _kinds(schema: JsonValue, within: JsonValue, depth: int = 0) -> set[str]:
    """The types that a schema allows; none where it does not say."""
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return set()
    named = schema.get("type")
    kinds = {named} if isinstance(named, str) else set()
    if isinstance(named, list):
        kinds |= {one for one in named if isinstance(one, str)}
    if schema.get("nullable") is True and kinds:
        kinds.add("null")
    for key in ("anyOf", "oneOf", "allOf"):
        options = schema.get(key)
        for option in options if isinstance(options, list) else ():
            kinds |= _kinds(option, within, depth + 1)
    if isinstance(named := schema.get("$ref"), str):
        kinds |= _kinds(_defined(named, within), within, depth + 1)
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if not kinds and isinstance(values, list) and any(isinstance(one, str) for one in values):
        kinds.add("string")
    return kinds


def _defined(reference: str, within: JsonValue) -> JsonValue:
    """The part of a schema that a reference like `#/$defs/Colour` names; None where there is none."""
    root, *path = reference.split("/")
    found = within if root == "#" else None
    for part in path:
        part = part.replace("~1", "/").replace("~0", "~")
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _parameters(name: str, tools: Sequence[ToolSchema]) -> Mapping[str, JsonValue]:
    """The schema of a tool's arguments; empty where no tool has the name."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def _function_end(text: str, start: int) -> int | None:
    """Behind the `</function>` of the function that begins at `start`."""
    named = _NAME.match(text, start)
    if named is None:
        return None
    position = named.end()
    while (opened := _PARAMETER.match(text, position)) is not None:
        ended = _VALUE_ENDS.search(text, opened.end())
        if ended is None:
            return None
        position = ended.end()
    closed = _FUNCTION_ENDS.match(text, position)
    return None if closed is None else closed.end()


def _written(value: JsonValue) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
