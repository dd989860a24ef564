"""One conversation as it grows: its prompt, and what the template writes after each turn of the policy.

What follows a turn is cut from the template's rendering of the whole conversation: its tools, its opening
messages, a turn of the kind that was sampled, and the message that answers it. The turn itself is a stand-in,
since the sampled tokens are there already; rendered a second time with another stand-in, the text is equal
from the turn's end on. No word is looked for in what a tool or a user says.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import cast

import numpy as np

from mosaic_rollout.chat.grammar import THINK_OPEN
from mosaic_rollout.chat.rendering import Data, Renderer, common_end, safe, stand_in
from mosaic_rollout.chat.template import Support, TurnKind
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message

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


def _think_is_open(text: str) -> bool:
    """Whether a prompt ends inside of thoughts; no data can end so, since the tag is a reserved word."""
    return text.rstrip().endswith(THINK_OPEN)
