"""Between messages and token ids: a model's own chat template, used once a prompt and once an observation.

What the policy sampled is never rendered again. An observation's tokens are what the template writes after an
assistant's turn (conversation.py), so the ids of a rollout are those of one uninterrupted conversation. Words
that steer a model are broken up in all data before the template sees them (reserved.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from mosaic_rollout.chat.call_formats import CallFormat
from mosaic_rollout.chat.conversation import Conversation
from mosaic_rollout.chat.grammar import SAFETY_OPEN, THINK_CLOSE
from mosaic_rollout.chat.prompts import load_prompt
from mosaic_rollout.chat.rendering import Data, Renderer
from mosaic_rollout.chat.template import PROBE_TOOL, USER
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message, ToolSchema

_KEPT_OPENINGS = 64  # groups
_CHECK_OPENED = re.compile(rf"{re.escape(THINK_CLOSE)}\s*{re.escape(SAFETY_OPEN)}\Z")


class Chat:
    """A tokenizer with a chat template, made to speak the plan-check-act loop.

    teach_loop: write the text that teaches the loop (prompts/loop_v2.md) into the system message. A model
    that learnt the loop in training, as the embedded one, does without.
    end_token_ids: further tokens that end a turn, as the model's folder names them (generation_config.json).
    today: the date that templates see which ask for it; None: the day on which this is made.

    call_format: in which the policy calls tools; None: as its template writes calls, or else as Hermes. Where
        the template writes none in it, the loop writes tools and calls itself.

    Raises UserError where the tokenizer has no chat template, or one that cannot write a conversation: a
    turn, its end, and what a tool or the user says next.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        teach_loop: bool,
        end_token_ids: Sequence[int] = (),
        today: date | None = None,
        call_format: CallFormat | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruct model, "
                "or put a chat_template.jinja file beside tokenizer.json"
            )
        self.tokenizer = tokenizer
        self._teach_loop = teach_loop
        self._renderer = Renderer(tokenizer, end_token_ids, today or date.today(), call_format)
        self.call_format = self._renderer.call_format
        self.call_format_is_the_templates = self._renderer.template.call_format is not None
        self.reserved = self._renderer.reserved
        self.stop_token_ids: tuple[int, ...] = self._renderer.stop_token_ids
        self.between_blocks = "\n" if teach_loop else ""
        """What stands between plan, check and answer in the form in which the loop is taught."""
        self._opens_check = self.between_blocks + SAFETY_OPEN
        self._tag, self._shared = self._find_tag()
        self._opening = lru_cache(maxsize=_KEPT_OPENINGS)(self._opening_anew)

    def conversation(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> Conversation:
        """The conversation that these messages open. UserError where messages or template cannot be used."""
        support = self._renderer.support(with_tools=bool(tools))
        try:
            key = json.dumps([list(messages), list(tools)])
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"a message or a tool's schema holds what is no JSON: {error}") from None
        opening, text = self._opening(key)
        return Conversation(self._renderer, support, opening, text, key)

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> tuple[np.ndarray, bool]:
        """Token ids [L] int64 of the opening messages, ready for the policy's first turn.

        Also says whether the prompt ends inside an opened `<think>`.
        """
        return self.conversation(messages, tools).prompt

    def observation(self, content: str, tool_name: str) -> tuple[np.ndarray, bool]:
        """What Conversation.observation gives after a message of the user's and a call."""
        return self.conversation([USER], [PROBE_TOOL]).observation(content, tool_name)

    def user_message(self, content: str) -> tuple[np.ndarray, bool]:
        """What Conversation.user_message gives after a message of the user's and an answer."""
        return self.conversation([USER], [PROBE_TOOL]).user_message(content)

    @property
    def check_tag(self) -> tuple[int, ...]:
        """The token ids that open a check after a plan, in the form in which the loop is taught.

        Where the vocabulary merges the end of `</think>` with what opens the check (`><`), that token is the
        first one of the tag: a gate is before it, at the last token that a plan has either way.
        """
        return self._tag

    def check_start(self, token_ids: Sequence[int], text: str, end: int) -> int:
        """How many of a turn's tokens [N], whose text is given, are before its gate.

        end: where the plan ends, `</think>` included, in characters.
        """
        if self._shared:
            count = self.tokens_through(token_ids, end - self._shared)
            if self.decode(token_ids[:count]) == text[: end - self._shared]:
                return count
        return self.tokens_through(token_ids, end)

    def tag_after(self, token_ids: Sequence[int]) -> tuple[int, ...] | None:
        """The tag that opens a check after a turn's tokens [N] up to its gate.

        It is `check_tag` wherever the plan was written in the vocabulary's usual tokens. None where a token
        holds the plan's end and more, so that no tag can follow.
        """
        for tag in (self._tag, tuple(self._renderer.encode(self._opens_check).tolist())):
            if _CHECK_OPENED.search(self.decode([*token_ids, *tag])):
                return tag
        return None

    def turn_text(self, token_ids: Sequence[int]) -> str:
        """The text of sampled tokens [N], the stop token left out, all other special tokens kept."""
        if len(token_ids) and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return self.decode(token_ids)

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        text = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    def tokens_through(self, token_ids: Sequence[int], end: int) -> int:
        """How many of the sampled tokens [N] it takes to write the first `end` characters of their text."""
        low, high = 0, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            if len(self.decode(token_ids[:middle])) >= end:
                high = middle
            else:
                low = middle + 1
        wanted = self.decode(token_ids)[:end]
        written = lambda count: self.decode(token_ids[:count])[:end] == wanted  # noqa: E731
        if written(low) and (low == 0 or not written(low - 1)):
            return low
        # Some decoders write a character's first bytes as several signs, which the whole character replaces.
        return next((count for count in range(len(token_ids)) if written(count)), len(token_ids))

    def _opening_anew(self, opening: str) -> tuple[Data, str]:
        """Opening messages and tools, given as JSON, as the template takes them, and what it writes."""
        messages, tools = json.loads(opening)
        support = self._renderer.support(with_tools=bool(tools))
        parts = [load_prompt("loop_v2")] if self._teach_loop else []
        found = self._renderer.opening(Data(messages, tools), parts, support)
        return found, self._renderer.text(found, support)

    def _find_tag(self) -> tuple[tuple[int, ...], int]:
        """The tag's ids, and how many characters of `</think>` they write as well."""
        plan_end = self._renderer.encode(THINK_CLOSE).tolist()
        opened = self._renderer.encode(THINK_CLOSE + self._opens_check).tolist()
        common = next(
            (i for i, ids in enumerate(zip(plan_end, opened, strict=False)) if len({*ids}) > 1), None
        )
        common = min(len(plan_end), len(opened)) if common is None else common
        return tuple(opened[common:]), len(self.decode(plan_end)) - len(self.decode(plan_end[:common]))
