"""A turn of the policy as a message of OpenAI's: its thoughts, what it says, the calls it makes.

The plan is `reasoning_content`, as other servers call it, and the check `safety_thoughts`. A call of
`refusal_tool` is OpenAI's `refusal` to clients that have no tool of that name.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass

from mosaic_rollout.chat.call_formats import FORMATS, CallFormat
from mosaic_rollout.chat.grammar import (
    SAFETY_CLOSE,
    SAFETY_OPEN,
    TAGS,
    THINK_CLOSE,
    THINK_OPEN,
    Turn,
    parse_turn,
)
from mosaic_rollout.chat.written_call import WrittenCall, skip_blank
from mosaic_rollout.types import JsonValue, Message, ToolCall, ToolSchema

_ID_SIGNS = string.ascii_letters + string.digits
_BARE_CALLS = ("{", "[", "<|")
"""How calls begin in formats without a marker, where the whole action is the call."""


@dataclass(frozen=True)
class Answer:
    """What a turn says, in its parts."""

    plan: str | None
    check: str | None
    content: str | None
    calls: tuple[tuple[str, ToolCall], ...]  # with the ids by which the client answers them
    refusal: str | None = None

    def message(self) -> Message:
        """The assistant's message."""
        found: Message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        if self.plan is not None:
            found["reasoning_content"] = self.plan
        if self.check is not None:
            found["safety_thoughts"] = self.check
        if self.calls:
            found["tool_calls"] = [written_call(name, call) for name, call in self.calls]
        return found


def written_call(call_id: str, call: ToolCall) -> dict[str, JsonValue]:
    """A call in OpenAI's form."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def read_answer(
    text: str,
    call_format: CallFormat,
    *,
    think_is_open: bool,
    tools: Sequence[ToolSchema],  # those that the policy was shown
    refusal_is_a_tool: bool,  # the client's own
    one_call: bool = False,
) -> Answer:
    """A turn's text, read. What cannot be read as a call or a thought is content."""
    turn = parse_turn(text, call_format, think_is_open=think_is_open, tools=tools)
    rest = text[turn.action_start :]
    found = call_format.find(rest)
    calls = _calls(turn, found, call_format, tools)
    said, position = "", 0
    for one in found if calls else ():
        said, position = said + rest[position : one.start], one.end
    plan, content = turn.plan, (said + rest[position:]).strip() or None
    if turn.plan_span is None and content and (think_is_open or content.startswith(THINK_OPEN)):
        opening = "" if think_is_open else THINK_OPEN
        plan, content = content.removeprefix(opening).strip(), None  # a thought that never ended
    if turn.action == "refusal" and not refusal_is_a_tool:
        reason = calls[0].arguments.get("reason")
        return Answer(plan, turn.check, content, (), refusal=str(reason or "refused"))
    numbered = tuple((_call_id(), call) for call in calls[: 1 if one_call else None])
    return Answer(plan, turn.check, content, numbered)


def settled(text: str, call_format: CallFormat, *, think_is_open: bool) -> tuple[str, str]:
    """The part of plan and content of a turn that nothing which is yet to come can change.

    text: the turn so far. Both are beginnings of what `read_answer` makes of the whole turn.
    """
    markers = (call_format.marker,) if call_format.marker else ()
    start = skip_blank(text, 0)
    plan = ""
    if not think_is_open and THINK_OPEN.startswith(text[start : start + len(THINK_OPEN)]):
        if not text.startswith(THINK_OPEN, start):
            return "", ""
        think_is_open, start = True, start + len(THINK_OPEN)
    if think_is_open:
        if not markers and text[skip_blank(text, start) :].startswith(_BARE_CALLS):
            return "", ""  # a call, in which the end of a plan may be quoted
        stop = undecided(text, start, (THINK_CLOSE, *markers))
        plan = text[start:stop].strip()
        if not text.startswith(THINK_CLOSE, stop):
            return plan, ""
        start = skip_blank(text, stop + len(THINK_CLOSE))
    if text.startswith(SAFETY_OPEN, start):
        stop = undecided(text, start, (SAFETY_CLOSE, *markers))
        if not text.startswith(SAFETY_CLOSE, stop):
            return plan, ""
        start = skip_blank(text, stop + len(SAFETY_CLOSE))
    rest = text[start:]
    if not markers:
        is_call = rest.startswith(_BARE_CALLS) or "<|".startswith(rest)
        if is_call or call_format not in FORMATS:
            return plan, ""
    return plan, rest[: undecided(rest, 0, (*markers, *TAGS))].strip()


def _calls(
    turn: Turn, found: Sequence[WrittenCall], call_format: CallFormat, tools: Sequence[ToolSchema]
) -> list[ToolCall]:
    """The calls of a turn: the one that the grammar reads, or several, which it takes for malformed."""
    if turn.call is not None:
        return [turn.call]
    if len(found) < 2:
        return []
    read = [call_format.parse(one.body, tools) if one.complete else None for one in found]
    calls = [call for call in read if call is not None]
    return calls if len(calls) == len(read) else []


def undecided(text: str, start: int, words: Sequence[str]) -> int:
    """Where in a text, from `start` on, a word stands or may be about to; its end where none does."""
    first = len(text)
    for word in words:
        found = text.find(word, start)
        if found < 0:
            sizes = range(min(len(word) - 1, len(text) - start), 0, -1)
            size = next((size for size in sizes if text.endswith(word[:size])), 0)
            found = len(text) - size
        first = min(first, found)
    return first


def _call_id() -> str:
    """Nine letters and digits, which is what every family's template takes."""
    return "".join(secrets.choice(_ID_SIGNS) for _ in range(9))
