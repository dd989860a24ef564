"""Call formats as users write them, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mosaic_rollout.chat.call_formats import CallFormat, WrittenCall
from mosaic_rollout.types import ToolCall, ToolSchema


class Arrow(CallFormat):
    """`=> name {"argument": "value"} <=`."""

    def __init__(self) -> None:
        super().__init__("arrow", "=>")

    def at(self, text: str, start: int) -> WrittenCall | None:
        end = text.find("<=", start)
        return None if end < 0 else WrittenCall(start, end + 2, text[start + 2 : end].strip())

    def parse(self, body: str, tools: Sequence[ToolSchema] = ()) -> ToolCall | None:
        name, _, arguments = body.partition(" ")
        try:
            return ToolCall(name, json.loads(arguments))
        except ValueError:
            return None

    def write(self, call: ToolCall) -> str:
        return f"=> {call.name} {json.dumps(call.arguments, ensure_ascii=False)} <="


class Broken(Arrow):
    def parse(self, body: str, tools: Sequence[ToolSchema] = ()) -> ToolCall | None:
        raise IndexError("no body")


class Texts(Arrow):
    def parse(self, body: str, tools: Sequence[ToolSchema] = ()) -> ToolCall | None:
        return body  # type: ignore[return-value]


class NoFormat:
    pass
