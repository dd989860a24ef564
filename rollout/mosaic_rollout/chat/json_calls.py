"""Calls that are JSON: between markers (Hermes, Phi-4-mini, Mistral), or bare (Llama 3, xLAM)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mosaic_rollout.chat.written_call import CallFormat, WrittenCall, skip_blank
from mosaic_rollout.plain_json import read_json, read_json_at
from mosaic_rollout.types import JsonValue, ToolCall, ToolSchema

_ARGUMENTS = ("arguments", "parameters")
"""The names under which arguments are read, in every format."""
_LIKE_ARGUMENTS = {*_ARGUMENTS, "args", "kwargs", "input", "inputs", "params"}
_LIKE_NAME = ("name", "function", "tool", "tool_name", "function_name")
_BESIDE = {"id", "type"}
"""Keys that say nothing of what the call does: OpenAI's, which models copy."""
_PYTHON_TAG = "<|python_tag|>"
_NAME_KEY = re.compile(rf"""["'](?:{"|".join(_LIKE_NAME)})["']\s*:""")
_ARGUMENTS_KEY = re.compile(rf"""["'](?:{"|".join(sorted(_LIKE_ARGUMENTS))})["']\s*:""")


def call_of(value: JsonValue) -> ToolCall | None:
    """The call that a JSON value is, by any order of its keys; None where it is not just one call.

    A list of one call is that call. `{"type": "function", "function": {...}}` is the call inside. A key that
    is not known, two keys for the arguments, or arguments that are no object (nor the JSON text of one) make
    it no call: nothing is ever run with a part of what was written left out.

    >>> call_of({"arguments": {"x": 1}, "name": "f"})
    ToolCall(name='f', arguments={'x': 1})
    >>> call_of({"name": "f", "args": {"x": 1}}) is None
    True
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        if value.keys() - _BESIDE != {"function"} or value.get("type", "function") != "function":
            return None
        value = value["function"]
    if not isinstance(value, Mapping) or value.get("type", "function") != "function":
        return None
    name, rest = value.get("name"), value.keys() - _BESIDE - {"name"}
    if not isinstance(name, str) or len(rest) > 1 or rest - {*_ARGUMENTS}:
        return None
    arguments: JsonValue = value[rest.pop()] if rest else {}
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments, unique_keys=True)
        except ValueError:
            return None
    return ToolCall(name, arguments) if isinstance(arguments, dict) else None


def resembles_call(value: JsonValue) -> bool:
    """Whether a JSON value was meant as a call: it names something and has a key for arguments.

    Any other value is an answer that happens to be JSON.
    """
    if isinstance(value, list):
        return any(resembles_call(one) for one in value if isinstance(one, Mapping))
    if not isinstance(value, Mapping):
        return False
    inner = value.get("function")
    if isinstance(inner, Mapping):
        return isinstance(inner.get("name"), str)
    named = any(isinstance(value.get(key), str) for key in _LIKE_NAME)
    return named and bool(value.keys() & _LIKE_ARGUMENTS)


class _JsonCalls(CallFormat):
    """What calls in JSON have in common."""

    def parse(self, body: str, tools: Sequence[ToolSchema] = ()) -> ToolCall | None:
        try:
            return call_of(read_json(body, unique_keys=True))
        except ValueError:
            return None


@dataclass(frozen=True)
class MarkedJson(_JsonCalls):
    """A JSON object, or a list with one, behind `marker` and before `closes`.

    closes None: nothing closes it, and nothing may follow it but another call.
    """

    closes: str | None
    as_list: bool = False  # as the family writes it; both are read

    def at(self, text: str, start: int) -> WrittenCall | None:
        """As of CallFormat.

        >>> MarkedJson("x", "<call>", "</call>").find('I read <call> {"name": "x"} </call>')
        [WrittenCall(start=7, end=35, body='{"name": "x"}', complete=True)]
        """
        if not text.startswith(self.marker, start):
            return None
        begins = skip_blank(text, start + len(self.marker))
        if not text.startswith(("{", "["), begins):
            return None
        try:
            _, ends = read_json_at(text, begins)
        except ValueError:
            return None
        after = skip_blank(text, ends)
        if self.closes is None:
            if after < len(text) and not text.startswith(self.marker, after):
                return None
            return WrittenCall(start, ends, text[begins:ends])
        if not text.startswith(self.closes, after):
            return None
        return WrittenCall(start, after + len(self.closes), text[begins:ends])

    def write(self, call: ToolCall) -> str:
        value = {"name": call.name, "arguments": call.arguments}
        body = json.dumps([value] if self.as_list else value, ensure_ascii=False)
        return f"{self.marker}{body}{self.closes or ''}"


@dataclass(frozen=True)
class BareJson(_JsonCalls):
    """The whole action is one JSON object, or a list with one, that resembles a call.

    Other JSON is an answer, and so is JSON with words before it. What begins as a call and goes on after it,
    or breaks off, is neither. Llama's `<|python_tag|>` may stand before the call, and then it must be one.
    """

    arguments_key: str  # as the family writes it; all of _ARGUMENTS are read
    as_list: bool = False  # as the family writes it; both are read

    def at(self, text: str, start: int) -> WrittenCall | None:
        found = self.find(text[start:])
        if not found or not found[0].complete:
            return None
        (call,) = found
        return WrittenCall(start + call.start, start + call.end, call.body)

    def find(self, text: str) -> list[WrittenCall]:
        start = skip_blank(text, 0)
        tagged = text.startswith(_PYTHON_TAG, start)
        begins = skip_blank(text, start + len(_PYTHON_TAG)) if tagged else start
        broken = [WrittenCall(start, len(text), text[begins:], complete=False)]
        if not text.startswith(("{", "["), begins):
            return broken if tagged else []
        try:
            value, ends = read_json_at(text, begins)
        except ValueError:
            meant = _NAME_KEY.search(text, begins) and _ARGUMENTS_KEY.search(text, begins)
            return broken if tagged or meant else []
        if not (tagged or resembles_call(value)):
            return []
        if skip_blank(text, ends) < len(text):
            return broken
        return [WrittenCall(start, ends, text[begins:ends])]

    def write(self, call: ToolCall) -> str:
        value = {"name": call.name, self.arguments_key: call.arguments}
        return json.dumps([value] if self.as_list else value, ensure_ascii=False)
