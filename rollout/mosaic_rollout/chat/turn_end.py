"""Where a template ends a turn of the policy, seen in what it writes after two turns that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mosaic_rollout.chat.reserved import Reserved
from mosaic_rollout.chat.template import PROBE_TOOL, USER, Support, Template, TurnKind
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message

STAND_INS = ("mosaicturna", "mosaicturnb")
"""What turns say where their own words do not matter; they differ in their last character."""
_NEXT = "mosaicnext"


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
    known: Sequence[TurnEnd],
) -> TurnEnd:
    """The end that the template writes: one of `known`, else the first token of its own after the turn.

    UserError where the template writes no such token, or not the turn itself.
    """
    tools = [PROBE_TOOL] if support.with_tools else None
    name = str(tokenizer.name_or_path)
    following: Message = {"role": "user", "content": _NEXT}
    if kind == "call" and support.outputs:
        following = support.output("mosaicprobe", _NEXT)
    texts = [
        template.render([USER, stand_in(support, kind, "mosaicprobe", which), following], tools, opens=True)
        for which in range(2)
    ]
    between = common_end(*texts).partition(_NEXT)
    if texts[0] == texts[1] or not between[1]:
        raise UserError(
            f"the chat template of {name!r} leaves out a turn of the assistant's, or what follows it, in a "
            f"conversation of user, assistant ({kind}), {following['role']}: it cannot be played"
        )
    for end in known:
        if end.text in between[0]:
            return end
    first = reserved.tokens.search(between[0])
    if first is not None:
        return TurnEnd(first.group(), _id(tokenizer, first.group()))
    closed = template.render([USER, stand_in(support, kind, "mosaicprobe", 0)], tools)
    text = closed.rpartition(STAND_INS[0])[2].strip()
    ids = tokenizer.encode(text, add_special_tokens=False) if text and text in between[0] else []
    if len(ids) != 1:
        written = f"; it writes {text!r} there" if text else ""
        raise UserError(
            f"the chat template of {name!r} does not mark where a turn ends with a token of its own{written}"
            "; use an instruct model whose tokenizer has such a token"
        )
    return TurnEnd(text, ids[0])


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    return int(tokenizer.get_added_vocab()[token])
