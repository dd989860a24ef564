"""The grammar of one turn: plan, optional check, one action (MOSAIC, arXiv 2603.03205).

    turn   = "<think>" plan "</think>" [ "<safety_thoughts>" check "</safety_thoughts>" ] action
    action = one tool call | a call of refusal_tool | plain text, the final answer

The parser reads whatever a policy writes: what it can use it returns, and `well_formed` says whether the turn
kept to the grammar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mosaic_rollout.call_formats import CallFormat, WrittenCall
from mosaic_rollout.types import ToolCall, ToolSchema

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


@dataclass(frozen=True)
class _Block:
    """A tagged block of a text: characters [start, end), tags included, and what is between them."""

    start: int
    end: int
    inner: str


@dataclass(frozen=True)
class Turn:
    """What one turn of the policy was parsed to."""

    plan: str | None
    check: str | None
    action: Literal["tool_call", "refusal", "answer", "malformed"]
    call: ToolCall | None
    answer: str | None
    well_formed: bool


def parse_turn(text: str, call_format: CallFormat, *, think_is_open: bool = False) -> Turn:
    """Parse a turn's text, its end-of-turn token already removed.

    think_is_open: the prompt itself ended with `<think>` (Qwen3 Thinking), so the opening tag is not sampled.

    >>> from mosaic_rollout.call_formats import HERMES
    >>> parse_turn("<think>say hi</think>hi", HERMES).answer
    'hi'
    """
    if think_is_open:
        text = THINK_OPEN + text
    plan_block, check_block = _block(text, THINK_OPEN, THINK_CLOSE), _block(text, SAFETY_OPEN, SAFETY_CLOSE)
    rest = _without(_without(text, THINK_OPEN, THINK_CLOSE), SAFETY_OPEN, SAFETY_CLOSE)
    calls = call_format.find(rest)
    action, call, answer = _parse_action(rest, calls, call_format)
    plan = plan_block.inner.strip() if plan_block else None
    check = check_block.inner.strip() if check_block else None
    well_formed = (
        action != "malformed"
        and bool(plan)
        and check != ""
        and all(text.count(tag) == (1 if plan_block else 0) for tag in (THINK_OPEN, THINK_CLOSE))
        and all(text.count(tag) == (1 if check_block else 0) for tag in (SAFETY_OPEN, SAFETY_CLOSE))
        and _in_order(text, plan_block, check_block, call_format)
    )
    return Turn(plan, check, action, call, answer, well_formed)


def _parse_action(
    rest: str, calls: list[WrittenCall], call_format: CallFormat
) -> tuple[Literal["tool_call", "refusal", "answer", "malformed"], ToolCall | None, str | None]:
    """The action in what is left of a turn once plan and check are taken out."""
    if len(calls) == 1:
        call = call_format.parse(calls[0].body)
        if call is None:
            return "malformed", None, None
        return ("refusal" if call.name == REFUSAL_TOOL else "tool_call"), call, None
    answer = rest.strip()
    broken = bool(calls) or not answer or call_format.marker in rest or any(tag in rest for tag in TAGS)
    return ("malformed", None, None) if broken else ("answer", None, answer)


def _in_order(text: str, plan: _Block | None, check: _Block | None, call_format: CallFormat) -> bool:
    """Nothing before the plan, the check right after it, and nothing around a call."""
    if plan is None or text[: plan.start].strip():
        return False
    after = plan.end
    if check is not None:
        if text[after : check.start].strip() or check.start < after:
            return False
        after = check.end
    action = text[after:].strip()
    calls = call_format.find(action)
    return not calls or (calls[0].start == 0 and calls[0].end == len(action))


def _block(text: str, opens: str, closes: str) -> _Block | None:
    """The first block between two tags, found in time linear in the text, which a pattern would not be."""
    start = text.find(opens)
    stop = text.find(closes, start + len(opens)) if start >= 0 else -1
    if stop < 0:
        return None
    return _Block(start, stop + len(closes), text[start + len(opens) : stop])


def _without(text: str, opens: str, closes: str) -> str:
    block = _block(text, opens, closes)
    return text if block is None else text[: block.start] + text[block.end :]
