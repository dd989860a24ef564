"""Where a template ends a turn of the policy, seen in what it writes after two turns that differ."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mosaic_rollout.chat.reserved import Reserved
from mosaic_rollout.chat.template import PROBE_TOOL, USER, Support, Template, TurnKind
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message

STAND_INS = ("mosaicturna", "mosaicturnb")
"""What turns say where their own words do not matter; they differ in their last character."""
NEXT, PROBE_NAME = "mosaicnext", "mosaicprobe"
"""What follows a turn, and the tool that is called, in conversations of ours."""


@dataclass(frozen=True)
class TurnEnd:
    """The token that ends a turn."""

    text: str
    token_id: int


def stand_in(support: Support, kind: TurnKind, name: str, which: int) -> Message:
    """A turn of a kind; a call is one of the tool `name`."""
    text = STAND_INS[which]
    return support.call(name, text) if kind == "call" else support.answer(text)


def common_end(one: str, other: str) -> str:
    """The longest text that both end with.

    >>> common_end("<a>x</a>.", "<a>yz</a>.")
    '</a>.'
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.endswith(other[len(other) - middle :]):
            low = middle
        else:
            high = middle - 1
    return one[len(one) - low :]


def find_turn_end(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    reserved: Reserved,
    support: Support,
    kind: TurnKind,
    following: Message,  # says NEXT
    known: Sequence[TurnEnd],  # by the model's folder
) -> TurnEnd:
    """The token between a turn and what follows it that the template writes to end the turn.

    That is the first one of `known` (GLM ends a turn with the mark of the next speaker), or else the first
    one that is written where nothing follows as well. UserError where there is none, or where the turn
    itself is not written.
    """
    tools = [PROBE_TOOL] if support.tools else None
    name = str(tokenizer.name_or_path)
    turns = [stand_in(support, kind, PROBE_NAME, which) for which in range(2)]
    texts = [template.render([USER, turn, following], tools, opens=True) for turn in turns]
    between, shown, _ = common_end(*texts).partition(NEXT)
    if texts[0] == texts[1] or not shown:
        raise UserError(
            f"the chat template of {name!r} leaves out a turn of the assistant's, or what follows it, in a "
            f"conversation of user, assistant ({kind}), {following['role']}: it cannot be played"
        )
    closing = between
    with suppress(UserError):  # some take no call without its output
        closing = common_end(*(template.render([USER, turn], tools) for turn in turns))
    named = {end.text for end in known}
    tokens = [match.group() for match in reserved.tokens.finditer(between)]
    # Marks within a turn, as of a call or an answer, come before its end; the model's own end tokens do not.
    ends = [token for token in tokens if token in named] or [token for token in tokens if token in closing]
    if ends:
        return TurnEnd(ends[0], int(tokenizer.get_added_vocab()[ends[0]]))
    text = closing.strip()
    ids = tokenizer.encode(text, add_special_tokens=False) if text and text in between else []
    if len(ids) != 1:
        written = f"; it writes {text[:80]!r} there" if text else ""
        raise UserError(
            f"the chat template of {name!r} does not mark where a turn ends with a token of its own{written}"
            "; use an instruct model whose tokenizer has such a token"
        )
    return TurnEnd(text, ids[0])
