"""How the model families write a tool call, and which of the ways a chat template uses."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mosaic_rollout.plain_json import read_json
from mosaic_rollout.types import ToolCall

_LLAMA_OPENS = re.compile(r'(?:<\|python_tag\|>)?(?P<body>\{\s*"name"\s*:)')


@dataclass(frozen=True)
class WrittenCall:
    """Where a call is written in a text, characters [start, end), and the JSON in it."""

    start: int
    end: int
    body: str  # an object, or a list with one object


@dataclass(frozen=True)
class CallFormat:
    """One family's way to write a call: JSON between `marker` and `closes`.

    closes None: the call is a bare object, from the brace before "name" to the last brace of the text.
    """

    name: str
    marker: str  # text that opens a call and never occurs in ordinary text
    closes: str | None
    arguments_key: str

    def find(self, text: str) -> list[WrittenCall]:
        """The calls in a turn's text, in time linear in its length whatever a model writes.

        >>> HERMES.find('I read <tool_call> {"name": "x"} </tool_call>')
        [WrittenCall(start=7, end=45, body='{"name": "x"}')]
        """
        if self.closes is None:
            opened, end = _LLAMA_OPENS.search(text), text.rfind("}") + 1
            if opened is None or end <= opened.end():
                return []
            return [WrittenCall(opened.start(), end, text[opened.start("body") : end])]
        calls, position = [], 0
        while (start := text.find(self.marker, position)) >= 0:
            body = start + len(self.marker)
            stop = text.find(self.closes, body)
            if stop < 0:
                break
            position = stop + len(self.closes)
            calls.append(WrittenCall(start, position, text[body:stop].strip()))
        return calls

    def parse(self, body: str) -> ToolCall | None:
        """The call written in `body`; None where it is not one well-formed call."""
        try:
            value = read_json(body)
            if isinstance(value, list) and len(value) == 1:
                value = value[0]
            if not isinstance(value, dict):
                return None
            name, arguments = value.get("name"), value.get(self.arguments_key, {})
            if isinstance(arguments, str):
                arguments = read_json(arguments)
        except ValueError:
            return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return ToolCall(name, arguments)


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>", "arguments")
"""Qwen2.5, Qwen3, SmolLM; also what a template without tool support is taught."""
PHI = CallFormat("phi", "<|tool_call|>", "<|/tool_call|>", "arguments")
"""Phi-4-mini."""
LLAMA = CallFormat("llama", '{"name":', None, "parameters")
"""Llama 3.1 and later: the whole action is one bare JSON object."""


def detect_call_format(rendered_call: str) -> CallFormat:
    """The format a template writes, seen in its rendering of one assistant tool call.

    Unknown renderings get Hermes': such templates are taught the format in the system message.
    """
    if HERMES.marker in rendered_call:
        return HERMES
    if PHI.marker in rendered_call:
        return PHI
    compact = re.sub(r"\s+", "", rendered_call)
    return LLAMA if LLAMA.marker in compact and '"parameters"' in compact else HERMES
