"""A model's template and tokenizer together: conversations in the shape the template takes, and their ids."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from mosaic_rollout.chat.messages import (
    LOOP_WORDS,
    OWN_WORDS,
    plain_message,
    with_system,
    with_turns_joined,
    with_written_calls,
    with_written_output,
    without_system,
)
from mosaic_rollout.chat.reserved import Reserved
from mosaic_rollout.chat.safe_data import Data, safe
from mosaic_rollout.chat.template import Support, Template, TurnKind
from mosaic_rollout.chat.turn_end import NEXT, PROBE_NAME, TurnEnd, find_turn_end
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message

_KEPT_ENCODINGS = 512  # texts


class Renderer:
    """Writes conversations as one model's template does, as text and as token ids.

    end_token_ids, today: see Chat. UserError where the template cannot write a conversation that is played.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int], today: date) -> None:
        self.name = str(tokenizer.name_or_path)
        self._tokenizer = tokenizer
        self.template = Template(tokenizer, today)
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
        self.followed: dict[tuple[str, ...], tuple[str, np.ndarray, Message]] = {}
        """What was rendered after a turn: by all that was said before it, the text, its ids, the message."""
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

    def text(self, data: Data, support: Support) -> str:
        """The text of a conversation up to the policy's next turn."""
        return self.template.render(data.messages, data.tools if support.tools else None, opens=True)

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
        return support.prepared(message) if support.calls else with_written_calls(message)

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
        return with_turns_joined(found) if support.takes_turns else found

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
