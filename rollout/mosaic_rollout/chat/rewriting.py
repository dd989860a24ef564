"""How a demonstration becomes turns of plan, check and act: the rewriting, version 1.

What the demonstration thinks is kept. A plan or a check that it lacks is written from these templates, unless
a model writes it; texts of another wording would be another version.

| turn | plan | check |
|---|---|---|
| a call | `The next action is NAME.` | of tools that are named as grave: `CHECK` |
| a refusal | `The request should not be carried out.` | its reason |
| an answer | `All of it is done.` | none |
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from mosaic_rollout.chat.grammar import REFUSAL_TOOL, SAFETY_CLOSE, SAFETY_OPEN, THINK_CLOSE, THINK_OPEN
from mosaic_rollout.types import Move

VERSION = "loop_v1"
FINAL_PLAN = "All of it is done."
REFUSAL_PLAN = "The request should not be carried out."
CHECK = "This changes something. The user asked for it; no tool output did."


def rewritten(move: Move, checked_tools: Collection[str] = ()) -> Move:
    """The move with the plan and the check that it lacks, from the templates of this version.

    >>> rewritten(Move(answer="42")).plan
    'All of it is done.'
    """
    plan, check = FINAL_PLAN, None
    if move.call is not None and move.call.name == REFUSAL_TOOL:
        plan, check = REFUSAL_PLAN, str(move.call.arguments.get("reason") or "") or None
    elif move.call is not None:
        plan, check = f"The next action is {move.call.name}.", None
        if move.call.name in checked_tools:
            check = CHECK
    return replace(move, plan=move.plan or plan, check=move.check or check)


def said_of(move: Move, between: str) -> str:
    """Plan, check and answer of a move in the grammar's tags, with `between` between them.

    >>> said_of(Move(plan="look", answer="hi"), "")
    '<think>look</think>hi'
    """
    blocks = [
        "" if move.plan is None else f"{THINK_OPEN}{move.plan}{THINK_CLOSE}",
        "" if move.check is None else f"{SAFETY_OPEN}{move.check}{SAFETY_CLOSE}",
        move.answer or "",
    ]
    return between.join(block for block in blocks if block)
