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
from mosaic_rollout.chat.turn_end import TurnEnd, find_turn_end
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
        self._support = {given: self.template.support(with_tools=given) for given in (True, False)}
        self.reserved = Reserved(
            tokenizer, {*LOOP_WORDS, *self.template.marks(*self._support.values())}, OWN_WORDS
        )
        eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self._ends = self._turn_ends([*eos, *end_token_ids])
        ends = (end.token_id for end in self._ends.values())
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*ends, *eos, *end_token_ids]))
        self.turns: dict[tuple[bool, TurnKind, str], str] = {}
        """Turns as the template writes their stand-ins: by whether there are tools, kind, and tool called."""
        self.followed: dict[tuple[str, ...], tuple[str, np.ndarray, Message]] = {}
        """What was rendered after a turn: by all that was said before it, the text, its ids, the message."""
        # Siblings of a group have a prompt in common, and tools often say the same.
        self.encode = lru_cache(maxsize=_KEPT_ENCODINGS)(self._encode_anew)

    def support(self, *, with_tools: bool) -> Support:
        """What the template writes by itself."""
        return self._support[with_tools]

    def turn_end(self, support: Support, kind: TurnKind) -> TurnEnd:
        """The token with which the template ends a turn."""
        return self._ends[support.with_tools, kind]

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
        if message["role"] == "tool" and not support.outputs:
            return with_written_output(message)
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

    def _turn_ends(self, end_token_ids: Sequence[int]) -> dict[tuple[bool, TurnKind], TurnEnd]:
        """The ends of turns by whether there are tools, and by kind."""
        found: dict[tuple[bool, TurnKind], TurnEnd] = {}
        texts = (str(self._tokenizer.convert_ids_to_tokens(token_id)) for token_id in end_token_ids)
        known = [TurnEnd(*end) for end in zip(texts, end_token_ids, strict=True)]
        for support in self._support.values():
            words = (self._tokenizer, self.template, self.reserved, support)
            answer = find_turn_end(*words, "answer", [])
            found[support.with_tools, "answer"] = answer
            if support.outputs_follow == "call":
                found[support.with_tools, "call"] = find_turn_end(*words, "call", [answer, *known])
        return found

    def _encode_anew(self, text: str) -> np.ndarray:  # [L] int64, read only
        return _fixed(self._tokenizer.encode(text, add_special_tokens=False))


def _fixed(token_ids: Sequence[int]) -> np.ndarray:
    found = np.asarray(token_ids, np.int64)
    found.flags.writeable = False
    return found
