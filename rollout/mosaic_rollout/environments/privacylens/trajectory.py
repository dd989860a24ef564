"""The course that a PrivacyLens case begins with: text of the form Action, Action Input, Observation."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from mosaic_rollout.types import JsonValue, Message

_CALL = re.compile(
    r"\s*Action:\s*(?P<name>[^\n]+?)\s*\n\s*Action Input:\s*(?P<arguments>.*?)\s*"
    r"Observation:\s*(?P<output>.*?)\s*(?=\n\s*Action:|\Z)",
    re.DOTALL,
)


@dataclass(frozen=True)
class PastCall:
    """One call of the course and what it returned."""

    name: str
    arguments: dict[str, JsonValue]
    output: str


def parse_trajectory(text: str) -> list[PastCall]:
    """The calls of a course. ValueError says where it has another form.

    Arguments that are no JSON object, also after quotes were unescaped, are kept as the text `input`: a few
    of the published cases have such.

    >>> parse_trajectory('Action: Look\\nAction Input: {"at": "it"}\\nObservation: nothing')
    [PastCall(name='Look', arguments={'at': 'it'}, output='nothing')]
    """
    calls, end = [], 0
    while text[end:].strip():
        match = _CALL.match(text, end)
        if match is None:
            raise ValueError(f"no Action, Action Input and Observation at {text[end:].strip()[:60]!r}")
        end = match.end()
        name = match["name"].strip(" \"'`")
        calls.append(PastCall(name, _arguments(match["arguments"]), match["output"]))
    return calls


def messages_of(calls: list[PastCall]) -> list[Message]:
    """The calls as an assistant's messages and tools' answers."""
    messages: list[Message] = []
    for number, call in enumerate(calls):
        call_id = f"past{number}"
        function: Message = {"name": call.name, "arguments": json.dumps(call.arguments)}
        calls_made: list[JsonValue] = [{"type": "function", "id": call_id, "function": function}]
        messages.append({"role": "assistant", "content": "", "tool_calls": calls_made})
        messages.append({"role": "tool", "name": call.name, "tool_call_id": call_id, "content": call.output})
    return messages


def _arguments(text: str) -> dict[str, JsonValue]:
    for candidate in (text, text.replace('\\"', '"')):
        try:
            found = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {"input": text}
