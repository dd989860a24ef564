"""A model's template and tokenizer together: conversations in the shape the template takes, and their ids.

Messages and schemas are made safe for the template first: the words of reserved.py are broken up in all of
them. Where a template ends a turn of the policy is seen in what it writes after two turns that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from mosaic_rollout.chat.messages import (
    LOOP_WORDS,
    OWN_WORDS,
    changed_texts,
    changed_tool,
    plain_message,
    with_system,
    with_turns_joined,
    with_written_calls,
    with_written_output,
    without_system,
)
from mosaic_rollout.chat.reserved import Reserved
from mosaic_rollout.chat.template import PROBE_TOOL, USER, Support, Template, TurnKind
from mosaic_rollout.chat.written_call import CallFormat
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message, ToolSchema


@dataclass(frozen=True)
class Data:
    """What a template is given of a conversation."""

    messages: Sequence[Message]
    tools: Sequence[ToolSchema] = ()

    def changed(self, change: Callable[[str], str], own: Callable[[str], str]) -> Data:
        """With every text changed; what an assistant says itself, by `own`."""
        return Data(
            [changed_texts(message, change, own) for message in self.messages],
            [changed_tool(tool, change) for tool in self.tools],
        )


def safe(data: Data, reserved: Reserved, live: Callable[[Data], list[int]]) -> Data:
    """The data without a reserved word, and without a part of one that the template completes.

    live: the tokens that steer in the data's rendering. A text that begins or ends like a reserved word, or
    is a piece of one, is put in quotes where the rendering has other such tokens without the quotes: a
    template that writes `<` + name + `>` shows a name `think` so. Elsewhere it stays as it is.
    """
    data = data.changed(reserved.neutral, reserved.neutral_own)
    if not _could_complete(data, reserved):
        return data
    quoted = data.changed(reserved.quoted, lambda text: reserved.quoted(text, own=True))
    return data if live(data) == live(quoted) else quoted


def _could_complete(data: Data, reserved: Reserved) -> bool:
    found: list[bool] = []

    def look(text: str) -> str:
        found.append(reserved.could_complete(text))
        return text

    def look_at_own(text: str) -> str:
        found.append(reserved.could_complete(text, own=True))
        return text

    data.changed(look, look_at_own)
    return any(found)


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


_KEPT_ENCODINGS = 512  # texts


class Renderer:
    """Writes conversations as one model's template does, as text and as token ids.

    end_token_ids, today, call_format: see Chat. UserError where the template cannot write a conversation that
    is played.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_token_ids: Sequence[int],
        today: date,
        call_format: CallFormat | None = None,
    ) -> None:
        self.name = str(tokenizer.name_or_path)
        self._tokenizer = tokenizer
        self.template = Template(tokenizer, today, call_format)
        self.call_format = self.template.call_format or self.template.taught
        eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self._named_ends = [*eos, *end_token_ids]
        self._support: dict[bool, Support | UserError] = {True: self.template.support(with_tools=True)}
        try:
            self._support[False] = self.template.support(with_tools=False)
        except UserError as error:  # told where a conversation without tools is wanted
            self._support[False] = error
        supports = [support for support in self._support.values() if isinstance(support, Support)]
        words = {*LOOP_WORDS, *self.template.marks(*supports)}
        self.reserved = Reserved(tokenizer, words, OWN_WORDS)
        self._ends: dict[tuple[bool, TurnKind, str], TurnEnd] = {}
        for support in supports:
            try:
                self._find_ends(support)
            except UserError as error:
                if support.with_tools:
                    raise
                self._support[False] = error
        ends = (end.token_id for end in self._ends.values())
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*ends, *self._named_ends]))
        self.turns: dict[tuple[bool, TurnKind, str], str] = {}
        """Turns as the template writes their stand-ins: by whether there are tools, kind, and tool called."""
        self.followed: dict[tuple[str, ...], tuple[str, np.ndarray, Sequence[Message]]] = {}
        """What was rendered after a turn: by all that was said before it, the text, its ids, the messages."""
        # Siblings of a group have a prompt in common, and tools often say the same.
        self.encode = lru_cache(maxsize=_KEPT_ENCODINGS)(self._encode_anew)

    def support(self, *, with_tools: bool) -> Support:
        """What the template writes by itself. UserError where it cannot write such a conversation."""
        support = self._support[with_tools]
        if isinstance(support, UserError):
            raise support
        return support

    def turn_end(self, support: Support, kind: TurnKind, following: Message) -> TurnEnd:
        """The token with which the template ends a turn before a message."""
        return self._ends[support.with_tools, kind, str(following["role"])]

    def text(self, data: Data, support: Support, *, opens: bool = True) -> str:
        """The text of a conversation, up to where the policy's next turn begins if that `opens`."""
        return self.template.render(data.messages, data.tools if support.tools else None, opens=opens)

    def opening(self, given: Data, parts: Sequence[str], support: Support) -> Data:
        """Opening messages and tools as the template takes them, with `parts` in the system message.

        The data are made safe; `parts` are the loop's own words. UserError for messages that cannot be read.
        """

        def opened(data: Data) -> Data:
            own = [*parts, *support.written_schemas(data.tools)]
            return Data(self._in_shape(data.messages, own, support), data.tools)

        def live(data: Data) -> list[int]:
            return self.reserved.live(self.encode(self.text(opened(data), support)).tolist())

        plain = Data([plain_message(message) for message in given.messages], given.tools)
        return opened(safe(plain, self.reserved, live))

    def taken(self, message: Message, support: Support) -> Message:
        """A message whose calls or output are text where the template would not write them."""
        if message["role"] == "tool":
            return support.prepared(message) if support.outputs else with_written_output(message)
        return support.prepared(message) if support.calls else with_written_calls(message, support.taught)

    def ids_after(self, text: str, cut: int, end: TurnEnd) -> np.ndarray:
        """The tokens [L] int64, read only, that a rendered text has from character `cut` on.

        end: the token that ends there. What it does to the text after it (some swallow white space) it does
        here as well. Where the tokenizer would merge it with that text, the sampled token stays as it is.
        """
        ids = self.encode(end.text + text[cut:])
        if len(ids) and ids[0] == end.token_id:
            return ids[1:]
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = encoding["offset_mapping"]
        following = next((i for i, (start, _) in enumerate(spans) if start >= cut), len(spans))
        if following and spans[following - 1][1] > cut:
            return self.encode(text[cut:])
        return _fixed(encoding["input_ids"][following:])

    def _in_shape(self, messages: Sequence[Message], parts: Sequence[str], support: Support) -> list[Message]:
        found = with_system([self.taken(message, support) for message in messages], parts)
        if not support.developer:
            found = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in found
            ]
        if not support.system:
            found = without_system(found)
        return self.in_turns(found, support)

    def in_turns(self, messages: Sequence[Message], support: Support) -> list[Message]:
        """The messages, those of one side in a row made one where the template takes no two."""
        return with_turns_joined(messages) if support.takes_turns else list(messages)

    def _find_ends(self, support: Support) -> None:
        """The ends of the turns that are played, by whether there are tools, kind, and what follows."""
        texts = (str(self._tokenizer.convert_ids_to_tokens(token_id)) for token_id in self._named_ends)
        known = [TurnEnd(*end) for end in zip(texts, self._named_ends, strict=True)]
        output = "tool" if support.outputs else "user"
        played: list[tuple[TurnKind, str]] = [("answer", "user"), (support.outputs_follow, output)]
        for kind, role in dict.fromkeys(played):
            following = (
                support.output(PROBE_NAME, NEXT) if role == "tool" else {"role": role, "content": NEXT}
            )
            end = find_turn_end(
                self._tokenizer, self.template, self.reserved, support, kind, following, known
            )
            self._ends[support.with_tools, kind, role] = end
            known.append(end)  # what ends an answer ends a call, too, though marks of a call come before it

    def _encode_anew(self, text: str) -> np.ndarray:  # [L] int64, read only
        return _fixed(self._tokenizer.encode(text, add_special_tokens=False))


def _fixed(token_ids: Sequence[int]) -> np.ndarray:
    found = np.asarray(token_ids, np.int64)
    found.flags.writeable = False
    return found
