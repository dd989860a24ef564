"""The grammar of one turn: plan, optional check, one action (MOSAIC, arXiv 2603.03205, section 3).

    turn   = "<think>" plan "</think>" [ "<safety_thoughts>" check "</safety_thoughts>" ] action
    action = one tool call | a call of refusal_tool | plain text, the final answer

The parser reads whatever a policy writes: what it can use it returns, and `well_formed` says whether the turn
kept to the grammar.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mosaic_rollout.call_formats import CallFormat
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

_PLAN = re.compile(rf"{THINK_OPEN}(.*?){THINK_CLOSE}", re.DOTALL)
_CHECK = re.compile(rf"{SAFETY_OPEN}(.*?){SAFETY_CLOSE}", re.DOTALL)


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
    plan_match, check_match = _PLAN.search(text), _CHECK.search(text)
    rest = _CHECK.sub("", _PLAN.sub("", text, count=1), count=1)
    calls = list(call_format.pattern.finditer(rest))
    action, call, answer = _parse_action(rest, calls, call_format)
    plan = plan_match.group(1).strip() if plan_match else None
    check = check_match.group(1).strip() if check_match else None
    well_formed = (
        action != "malformed"
        and bool(plan)
        and check != ""
        and all(text.count(tag) == (1 if plan_match else 0) for tag in (THINK_OPEN, THINK_CLOSE))
        and all(text.count(tag) == (1 if check_match else 0) for tag in (SAFETY_OPEN, SAFETY_CLOSE))
        and _in_order(text, plan_match, check_match, call_format)
    )
    return Turn(plan, check, action, call, answer, well_formed)


def _parse_action(
    rest: str, calls: list[re.Match[str]], call_format: CallFormat
) -> tuple[Literal["tool_call", "refusal", "answer", "malformed"], ToolCall | None, str | None]:
    """The action in what is left of a turn once plan and check are taken out."""
    if len(calls) == 1:
        call = call_format.parse(calls[0].group("body"))
        if call is None:
            return "malformed", None, None
        return ("refusal" if call.name == REFUSAL_TOOL else "tool_call"), call, None
    answer = rest.strip()
    broken = bool(calls) or not answer or call_format.marker in rest or any(tag in rest for tag in TAGS)
    return ("malformed", None, None) if broken else ("answer", None, answer)


def _in_order(
    text: str, plan: re.Match[str] | None, check: re.Match[str] | None, call_format: CallFormat
) -> bool:
    """Nothing before the plan, the check right after it, and nothing around a call."""
    if plan is None or text[: plan.start()].strip():
        return False
    after = plan.end()
    if check is not None:
        if text[after : check.start()].strip() or check.start() < after:
            return False
        after = check.end()
    action = text[after:].strip()
    call = call_format.pattern.search(action)
    return call is None or (call.start() == 0 and call.end() == len(action))
