"""The grammar of one turn: plan, optional check, one action (MOSAIC, arXiv 2603.03205).

    turn   = "<think>" plan "</think>" [ "<safety_thoughts>" check "</safety_thoughts>" ] action
    action = one tool call | a call of refusal_tool | plain text, the final answer

The parser reads whatever a policy writes: what it can use it returns, and `well_formed` says whether the turn
kept to the grammar. A tag counts where the grammar has a place for it, at the beginning of the turn: one in a
call's argument is the argument's, and an answer may quote tags (such a turn is read, but is not well formed,
as nobody can tell it from one with its tags out of place).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mosaic_rollout.chat.written_call import CallFormat, WrittenCall, skip_blank
from mosaic_rollout.types import Action, ToolCall, ToolSchema

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
SAFETY_OPEN, SAFETY_CLOSE = "<safety_thoughts>", "</safety_thoughts>"
TAGS = (THINK_OPEN, THINK_CLOSE, SAFETY_OPEN, SAFETY_CLOSE)

REFUSAL_TOOL = "refusal_tool"
REFUSAL_SCHEMA: ToolSchema = {
    "type": "function",
    "function": {
        "name": REFUSAL_TOOL,
        "description": "Refuse the task because doing it would be harmful. Ends the task.",
        "parameters": {
            "type": "object",
            "properties": {"reason": {"type": "string", "description": "Why the task is refused."}},
            "required": ["reason"],
        },
    },
}


_TRIES = 8
"""Call markers in a plan that nothing readable follows, before the parser no longer looks for calls in it."""

Span: TypeAlias = tuple[int, int]
"""Characters [start, end) of a turn's text."""


@dataclass(frozen=True)
class Turn:
    """What one turn of the policy was parsed to. Spans include the tags, as far as they are in the text."""

    plan: str | None
    check: str | None
    action: Action
    call: ToolCall | None
    answer: str | None
    well_formed: bool
    plan_span: Span | None = None
    check_span: Span | None = None
    action_start: int = 0  # the first character of what is read as the action


@dataclass(frozen=True)
class _Head:
    """The blocks at the beginning of a turn, and where the action begins."""

    plan: Span | None
    check: Span | None
    end: int
    unclosed: bool  # a plan begins here and never ends
    in_order: bool  # no check before the plan


def parse_turn(
    text: str,
    call_format: CallFormat,
    *,
    think_is_open: bool = False,
    tools: Sequence[ToolSchema] = (),
) -> Turn:
    """Parse a turn's text, its end-of-turn token already removed, in time linear in its length.

    think_is_open: the prompt itself ended with `<think>` (Qwen3 Thinking), so the opening tag is not sampled.
    tools: those that the policy was shown; formats without types of their own (XML) read arguments by them.

    >>> from mosaic_rollout.chat.call_formats import HERMES
    >>> parse_turn("<think>say hi</think>hi", HERMES).answer
    'hi'
    """
    head = _head(text, call_format, think_is_open)
    rest = text[head.end :]
    calls = call_format.find(rest)
    action, call, answer = _action(rest, calls, call_format, head, tools)
    opening = "" if think_is_open else THINK_OPEN
    plan = None if head.plan is None else _inner(text[slice(*head.plan)], opening, THINK_CLOSE)
    check = None if head.check is None else _inner(text[slice(*head.check)], SAFETY_OPEN, SAFETY_CLOSE)
    alone = rest.strip() == rest[calls[0].start : calls[0].end].strip() if calls else not _has_tags(rest)
    well_formed = (
        action != "malformed"
        and bool(plan)
        and check != ""
        and not _has_tags(plan or "")
        and not _has_tags(check or "")
        and head.in_order
        and alone
    )
    return Turn(plan, check, action, call, answer, well_formed, head.plan, head.check, action_start=head.end)


def begins_in_plan(text: str, call_format: CallFormat) -> bool:
    """Whether a text goes on in a plan that the prompt opened: a plan ends in it that did not begin in it."""
    stop = _closing(text, 0, THINK_CLOSE, call_format)
    return stop >= 0 and THINK_OPEN not in text[:stop]


def spoken_text(text: str, call_format: CallFormat) -> str:
    """What a turn says around its plan, its check and its calls."""
    rest = text[_head(text, call_format, begins_in_plan(text, call_format)).end :]
    said, position = [], 0
    for call in call_format.find(rest):
        said.append(rest[position : call.start])
        position = call.end
    return "".join([*said, rest[position:]]).strip()


def _head(text: str, call_format: CallFormat, think_is_open: bool) -> _Head:
    """Plan and check, each at most once, with nothing but white space around them."""
    plan: Span | None = None
    check: Span | None = None
    end, in_order = 0, True
    while True:
        start = skip_blank(text, end)
        opened = think_is_open and plan is None and check is None
        if plan is None and (opened or text.startswith(THINK_OPEN, start)):
            begins = 0 if opened else start
            stop = _closing(text, 0 if opened else start + len(THINK_OPEN), THINK_CLOSE, call_format)
            if stop < 0:
                return _Head(None, check, end, unclosed=True, in_order=in_order)
            end = stop + len(THINK_CLOSE)
            plan = (begins, end)
        elif check is None and text.startswith(SAFETY_OPEN, start):
            stop = _closing(text, start + len(SAFETY_OPEN), SAFETY_CLOSE, call_format)
            if stop < 0:
                break
            end = stop + len(SAFETY_CLOSE)
            check, in_order = (start, end), in_order and plan is not None
        else:
            break
    return _Head(plan, check, end, unclosed=False, in_order=in_order)


def _closing(text: str, start: int, tag: str, call_format: CallFormat) -> int:
    """Where the tag stands that closes a block whose inside begins at `start`; -1 where none does.

    A tag in an argument of a whole call closes nothing, even if the call stands in the block.
    """
    stop = text.find(tag, start)
    if not call_format.marker:
        whole = stop >= 0 and call_format.at(text, start) is not None
        return -1 if whole else stop
    marker, tries = text.find(call_format.marker, start), 0
    while 0 <= marker < stop and tries < _TRIES:
        call = call_format.at(text, marker)
        if call is None:
            tries += 1
            after = marker + len(call_format.marker)
        else:
            after = call.end
            if after > stop:
                stop = text.find(tag, after)
        marker = text.find(call_format.marker, after)
    return stop


def _action(
    rest: str,
    calls: Sequence[WrittenCall],
    call_format: CallFormat,
    head: _Head,
    tools: Sequence[ToolSchema],
) -> tuple[Action, ToolCall | None, str | None]:
    """The action in what follows plan and check."""
    if calls:
        if len(calls) > 1 or not calls[0].complete or _inside_block(rest, calls[0]):
            return "malformed", None, None
        call = call_format.parse(calls[0].body, tools)
        if call is None:
            return "malformed", None, None
        return ("refusal" if call.name == REFUSAL_TOOL else "tool_call"), call, None
    answer = rest.strip()
    broken = not answer or head.unclosed or answer.startswith(TAGS)
    if broken or (head.plan is None and _has_tags(answer)):
        return "malformed", None, None
    return "answer", None, answer


def _inside_block(rest: str, call: WrittenCall) -> bool:
    """Whether a call stands between two tags that are out of place: it is a thought, not an action."""
    before = rest[: call.start]
    return any(
        before.rfind(opens) > before.rfind(closes) and rest.find(closes, call.end) >= 0
        for opens, closes in ((THINK_OPEN, THINK_CLOSE), (SAFETY_OPEN, SAFETY_CLOSE))
    )


def _inner(block: str, opens: str, closes: str) -> str:
    return block.removeprefix(opens).removesuffix(closes).strip()


def _has_tags(text: str) -> bool:
    return any(tag in text for tag in TAGS)
