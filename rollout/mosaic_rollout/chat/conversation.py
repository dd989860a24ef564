"""One conversation as it grows: its prompt, and what the template writes after each turn of the policy.

What follows a turn is cut from the template's rendering of the whole conversation: its tools, its opening
messages, a turn of the kind that was sampled, and the message that answers it. The turn itself is a stand-in,
since the sampled tokens are there already; rendered a second time with another stand-in, the text is equal
from the turn's end on. No word is looked for in what a tool or a user says.

A turn that is demonstrated instead of sampled is written as the template writes an assistant's message.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import cast

import numpy as np

from mosaic_rollout.chat.grammar import THINK_OPEN, Turn, parse_turn
from mosaic_rollout.chat.messages import with_written_calls
from mosaic_rollout.chat.rendering import Data, Renderer, TurnEnd, common_end, safe, stand_in
from mosaic_rollout.chat.template import Support, TurnKind
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message, ToolCall

_KEPT_TURNS = 512
_KEPT_WAYS = 512


class Conversation:
    """A conversation as a Renderer writes it. It holds no sampled text, only of which kind each turn was.

    opening: what the template is given, as it takes it; text: what it writes for that. key: tells openings
    apart, so that conversations that have gone the same way, as siblings often do, are rendered once.
    """

    def __init__(self, renderer: Renderer, support: Support, opening: Data, text: str, key: str) -> None:
        self._renderer, self._support, self._text = renderer, support, text
        self._way: tuple[str, ...] = (key,)
        self.messages, self.tools = list(opening.messages), list(opening.tools)

    @property
    def prompt(self) -> tuple[np.ndarray, bool]:
        """Token ids [L] int64 up to the policy's next turn; whether they end inside an opened `<think>`."""
        return self._renderer.encode(self._text), _think_is_open(self._text)

    def turn(self, said: str, call: ToolCall | None) -> np.ndarray:
        """Token ids [L] int64 of a turn of the policy's, from the prompt's end through the turn's own end.

        said: plan and check in their tags, and the answer behind them where nothing is called. The ids are
        those that the template writes for such a message of the assistant's. Where it leaves thoughts out, or
        begins a message otherwise than a prompt ends, the turn is written as the loop reads it.
        UserError where the template cannot write it so that it is read back as it was given.
        """
        renderer, support = self._renderer, self._support
        message = renderer.taken(support.turn(said, call), support)

        def live(data: Data) -> list[int]:
            return renderer.reserved.live(renderer.encode(self._as_the_loop_reads(data.messages[0])).tolist())

        message = safe(Data([message]), renderer.reserved, live).messages[0]
        kind = "answer" if call is None else support.outputs_follow
        role = "tool" if support.outputs and call is not None else "user"
        end = renderer.turn_end(support, kind, {"role": role})
        plain = self._as_the_loop_reads(message)
        wanted = self._read(plain)
        text = self._as_the_template_writes(message, end)
        if text is None or _meaning(self._read(text)) != _meaning(wanted):
            text = plain
        if wanted.action == "malformed" or (wanted.call is None) != (call is None):
            raise UserError(
                f"a turn cannot be written so that it is read back in the call format "
                f"{renderer.call_format.name}: {plain!r:.200}"
            )
        return self._ids_of_turn(text + end.text, end)

    def _as_the_template_writes(self, message: Message, end: TurnEnd) -> str | None:
        """The text of a turn without its end; None where it does not go on from the prompt."""
        try:
            text = self._renderer.text(
                Data([*self.messages, message], self.tools), self._support, opens=False
            )
        except UserError:  # some take no call without its output
            return None
        if not text.startswith(self._text):
            return None
        return text[len(self._text) :].partition(end.text)[0]

    def _as_the_loop_reads(self, message: Message) -> str:
        """The text of a turn without its end: what is said, then the call in the loop's call format."""
        text = str(with_written_calls(message, self._renderer.call_format).get("content") or "")
        return text.removeprefix(THINK_OPEN) if _think_is_open(self._text) else text

    def _read(self, text: str) -> Turn:
        opened = _think_is_open(self._text)
        return parse_turn(text, self._renderer.call_format, think_is_open=opened, tools=self.tools)

    def _ids_of_turn(self, text: str, end: TurnEnd) -> np.ndarray:
        """The ids that a turn's text has behind the prompt; by itself, where it merges with its end."""
        renderer = self._renderer
        marks = [match.start() for match in renderer.reserved.tokens.finditer(self._text)]
        prompt = self._text[marks[-1] :] if marks else self._text
        before, ids = renderer.encode(prompt), renderer.encode(prompt + text)
        ids = ids[len(before) :] if np.array_equal(ids[: len(before)], before) else renderer.encode(text)
        if not len(ids) or ids[-1] != end.token_id:
            raise UserError(f"the tokenizer of {renderer.name!r} does not read {end.text!r} at a turn's end")
        return ids

    def observation(self, content: str, tool_name: str) -> tuple[np.ndarray, bool]:
        """Token ids [L] int64 from the end of a turn that called a tool to the start of the next turn.

        A template that leaves tool messages out (Phi-4's) gets the output as a user's, between tags.
        """
        return self.following([{"role": "tool", "name": tool_name, "content": content}])

    def user_message(self, content: str) -> tuple[np.ndarray, bool]:
        """Token ids [L] int64 from the end of the policy's answer to the start of its next turn.

        They follow the tokens as they were sampled. Templates that leave earlier thoughts out once the user
        speaks again (Qwen3's) are not followed in that: it would be another conversation than was sampled.
        """
        return self.following([{"role": "user", "content": content}])

    def following(self, messages: Sequence[Message], *, ended: bool = True) -> tuple[np.ndarray, bool]:
        """Token ids [L] int64 of what follows a turn of the policy, up to the start of its next one.

        messages: the first is a tool's, with the tool's name, or the user's. ended: False where the turn was
        cut off, so that the token which ends it comes first.
        """
        first, name, kind = messages[0], "", cast(TurnKind, "answer")
        if first["role"] == "tool":
            name, kind = self._renderer.reserved.neutral(str(first["name"])), self._support.outputs_follow
        followed = self._renderer.followed
        self._way += (kind, name, json.dumps(messages))
        found = followed.get(self._way) or self._followed_by(kind, name, messages)
        if len(followed) >= _KEPT_WAYS:
            followed.pop(next(iter(followed)), None)
        followed[self._way] = found
        self._text, ids, taken = found
        self.messages += [stand_in(self._support, kind, name, 0), *taken]
        if not ended:
            end = self._renderer.turn_end(self._support, kind, taken[0])
            ids = np.concatenate([[end.token_id], ids])
        return ids, _think_is_open(self._text)

    def copy(self) -> Conversation:
        """The same conversation, to go on in another way."""
        other = copy.copy(self)
        other.messages = list(self.messages)
        return other

    def _followed_by(
        self, kind: TurnKind, name: str, messages: Sequence[Message]
    ) -> tuple[str, np.ndarray, Sequence[Message]]:
        """The whole text then, the ids of what is new in it, and the messages as the template takes them."""
        renderer, support = self._renderer, self._support

        def followed(data: Data) -> tuple[str, np.ndarray, Sequence[Message]]:
            taken = renderer.in_turns(
                [renderer.taken(message, support) for message in data.messages], support
            )
            text, cut = self._continued(kind, name, taken)
            return text, renderer.ids_after(text, cut, renderer.turn_end(support, kind, taken[0])), taken

        def live(data: Data) -> list[int]:
            return renderer.reserved.live(followed(data)[1].tolist())

        return followed(safe(Data(messages), renderer.reserved, live))

    def _continued(self, kind: TurnKind, name: str, messages: Sequence[Message]) -> tuple[str, int]:
        """The text of everything through the messages, and where in it the turn has ended."""
        renderer, support = self._renderer, self._support
        text = self._with(stand_in(support, kind, name, 0), messages)
        as_before = text.startswith(self._text)
        turn = renderer.turns.get((support.with_tools, kind, name))
        if turn is not None and as_before and text.startswith(turn, len(self._text)):
            return text, len(self._text) + len(turn)
        after = common_end(text, self._with(stand_in(support, kind, name, 1), messages))
        end = renderer.turn_end(support, kind, messages[0]).text
        if end not in after:
            raise UserError(
                f"the chat template of {renderer.name!r} does not end a turn with {end!r} "
                f"before a message of the role {messages[0]['role']!r}, though it does so elsewhere"
            )
        cut = len(text) - len(after) + after.index(end) + len(end)
        if as_before and len(renderer.turns) < _KEPT_TURNS:
            renderer.turns[support.with_tools, kind, name] = text[len(self._text) : cut]
        return text, cut

    def _with(self, turn: Message, messages: Sequence[Message]) -> str:
        return self._renderer.text(Data([*self.messages, turn, *messages], self.tools), self._support)


def _meaning(turn: Turn) -> tuple[object, ...]:
    return turn.plan, turn.check, turn.action, turn.call, turn.answer


def _think_is_open(text: str) -> bool:
    """Whether a prompt ends inside of thoughts; no data can end so, since the tag is a reserved word."""
    return text.rstrip().endswith(THINK_OPEN)
