"""A turn's sampled tokens as a step: what the grammar reads in their text, and where in them it stands."""

from __future__ import annotations

from collections.abc import Sequence

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.grammar import Turn, parse_turn
from mosaic_rollout.types import Step, ToolSchema


def read_step(
    chat: Chat,
    ids: list[int],  # [N] the turn's tokens
    start: int,  # index of the first of them in the rollout
    think_is_open: bool,  # the prompt ended inside of thoughts
    tools: Sequence[ToolSchema],  # those that the policy was shown
) -> Step:
    """The step that a turn's tokens make, not yet carried out."""
    text = chat.turn_text(ids)
    turn = parse_turn(text, chat.call_format, think_is_open=think_is_open, tools=tools)
    gate = None if turn.plan_span is None else chat.check_start(ids, text, turn.plan_span[1])
    return Step(
        prompt_end=start,
        end=start + len(ids),
        text=text,
        plan=turn.plan,
        check=turn.check,
        action=turn.action,
        call=turn.call,
        answer=turn.answer,
        observation=None,
        safety_tokens=_safety_tokens(chat, ids, turn),
        well_formed=turn.well_formed,
        check_start=None if gate is None else start + gate,
    )


def _safety_tokens(chat: Chat, ids: list[int], turn: Turn) -> int:
    """Sampled tokens from `<safety_thoughts>` through its closing tag."""
    if turn.check_span is None:
        return 0
    start, end = turn.check_span
    before = chat.tokens_through(ids, start)
    if before and len(chat.decode(ids[:before])) > start:  # the tag's first character shares a token
        before -= 1
    return chat.tokens_through(ids, end) - before
