"""Calls drawn at random, with texts in their arguments that try to pass for something else."""

from __future__ import annotations

import re
from random import Random

from mosaic_rollout.chat.call_formats import QWEN3_CODER, CallFormat
from mosaic_rollout.chat.grammar import TAGS
from mosaic_rollout.types import JsonValue, ToolCall, ToolSchema

MARKS = (
    *TAGS,
    *("<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", "[TOOL_CALLS]", "<|python_tag|>"),
    *("<function=f>", "</function>", "<parameter=x>", "</parameter>", "<|im_end|>", "<|eot_id|>"),
    *('{"name": "f", "arguments": {}}', '"parameters": {', "[f(a=1)]", "[f(", ")]", "', ", '", "'),
    *("{", "}", "[", "]", '"', "'", "\\", "\\n", "\\u0041", "\n", "\r", "\t", " ", ",", ":", "=", "#"),
    *("é", "漢", "😀", "\u2028", "\x00", "\x7f", "null", "None", "True", "true", "1", "0.5", "-", "a", "b c"),
)
"""Pieces of texts: what opens, closes or escapes in one of the formats, and ordinary letters."""
_AMBIGUOUS = re.compile(r"</parameter>\s*(?:<parameter=|</function>)")


def hostile_text(random: Random, longest: int = 8) -> str:
    return "".join(random.choice(MARKS) for _ in range(random.randrange(longest)))


def drawn_value(random: Random, depth: int = 0) -> JsonValue:
    kind = random.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return hostile_text(random)
    if kind < 6:
        whole = random.choice((0, 1, -7, 2**62, -(2**63)))
        return random.choice((whole, 0.5, -1e300, 2.0, True, False, None))
    if kind == 6:
        return [drawn_value(random, depth + 1) for _ in range(random.randrange(3))]
    return {hostile_text(random, 3): drawn_value(random, depth + 1) for _ in range(random.randrange(3))}


def drawn_call(random: Random) -> ToolCall:
    """A name and arguments' names as tools have them; all else is hostile."""
    name = random.choice(("f", "read_file", "refusal_tool", "math.add", "name"))
    keys = random.sample(("x", "path", "name", "arguments", "parameters", "function", "type"), 4)
    return ToolCall(name, {key: drawn_value(random) for key in keys[: random.randrange(5)]})


def schema_of(call: ToolCall) -> ToolSchema:
    """A tool that takes just such a call."""
    properties: dict[str, JsonValue] = {key: {"type": _kind(value)} for key, value in call.arguments.items()}
    parameters: JsonValue = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": call.name, "parameters": parameters}}


def can_be_written(call: ToolCall, call_format: CallFormat) -> bool:
    """Whether the format has a way to write the call: XML escapes nothing."""
    ends = len(_AMBIGUOUS.findall(call_format.write(call)))
    return call_format is not QWEN3_CODER or ends == len(call.arguments)


def _kind(value: JsonValue) -> str:
    for kind, name in (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list, "array"),
    ):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "object"
