"""How the model families write a tool call, and which of the ways a chat template uses.

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

from collections.abc import Sequence

from mosaic_rollout.chat.json_calls import BareJson, MarkedJson
from mosaic_rollout.chat.python_calls import PythonCalls
from mosaic_rollout.chat.written_call import CallFormat, WrittenCall
from mosaic_rollout.chat.xml_calls import XmlCalls
from mosaic_rollout.types import ToolCall, ToolSchema

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


def detect_call_format(rendered_call: str) -> CallFormat | None:
    """The format that reads one call in an assistant's action as its template wrote it; None if none does.

    >>> detect_call_format('<tool_call>{"name": "f", "arguments": {}}</tool_call>').name
    'hermes'
    """
    found: list[CallFormat] = []
    for call_format in FORMATS:
        call = read_call(rendered_call, call_format)
        if call is not None:
            found.append(call_format)
            if rendered_call.lstrip()[:1] == call_format.write(call)[:1]:  # a list, or an object
                return call_format
    return found[0] if found else None
