"""How the model families write a tool call, and which of the ways a chat template uses."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from mosaic_rollout.types import ToolCall


@dataclass(frozen=True)
class CallFormat:
    """One family's way to write a call.

    `pattern` finds a call in a turn's text; group "body" is JSON: an object, or a list with one object.
    """

    name: str
    marker: str  # text that opens a call and never occurs in ordinary text
    pattern: re.Pattern[str]
    arguments_key: str

    def parse(self, body: str) -> ToolCall | None:
        """The call written in `body`; None where it is not one well-formed call."""
        try:
            value = json.loads(body)
        except ValueError:
            return None
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get(self.arguments_key, {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return None
        return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None


HERMES = CallFormat(  # Qwen2.5, Qwen3, SmolLM; also what a template without tool support is taught
    "hermes", "<tool_call>", re.compile(r"<tool_call>\s*(?P<body>.*?)\s*</tool_call>", re.DOTALL), "arguments"
)
PHI = CallFormat(  # Phi-4-mini
    "phi",
    "<|tool_call|>",
    re.compile(r"<\|tool_call\|>\s*(?P<body>.*?)\s*<\|/tool_call\|>", re.DOTALL),
    "arguments",
)
LLAMA = CallFormat(  # Llama 3.1 and later: the whole action is one bare JSON object
    "llama",
    '{"name":',
    re.compile(r'(?:<\|python_tag\|>)?(?P<body>\{\s*"name"\s*:.*\})', re.DOTALL),
    "parameters",
)


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
