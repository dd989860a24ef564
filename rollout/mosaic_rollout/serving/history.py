"""What conversations were in tokens: what was sampled is found again, never tokenised anew.

A request repeats its whole conversation as text. Where it goes on from an answer that was given here, its
prompt is that answer's tokens, as they were shown and sampled, and the template's tokens for what follows.
An answer is known by all that was said before it, its words and its calls, by their ids. What the client has
changed, or has written itself, is rendered from its text, as another conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.conversation import Conversation
from mosaic_rollout.chat.grammar import REFUSAL_SCHEMA, REFUSAL_TOOL, begins_in_plan, parse_turn
from mosaic_rollout.chat.messages import plain_message
from mosaic_rollout.serving.answer import Answer
from mosaic_rollout.types import Completion, JsonValue, Message, ToolSchema

_READ = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request in tokens."""

    parent: SampledTurn | None  # the answer that it goes on from; None: it begins anew
    token_ids: np.ndarray  # [L] int64, beginning with all tokens of the parent
    think_is_open: bool  # it ends inside of thoughts
    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...]  # those that the policy is shown
    refusal_is_a_tool: bool  # of the client's own
    talk: Conversation
    digest: bytes  # of tools and messages
    opening: bytes  # of tools and first message

    @property
    def following(self) -> str:
        """What the client said after the parent."""
        said = self.messages[len(self.parent.prompt.messages) + 1 :] if self.parent else ()
        return "\n".join(str(message.get("content") or "") for message in said)


@dataclass(frozen=True, eq=False)
class SampledTurn:
    """An answer of the policy, and what it answers."""

    prompt: Prompt
    completion: Completion
    answer: Answer

    @property
    def token_ids(self) -> np.ndarray:  # [L] int64, prompt and answer
        return np.concatenate([self.prompt.token_ids, self.completion.token_ids])


class History:
    """The answers that were given, of one episode or of all clients of a server.

    offers_refusal: the policy is shown `refusal_tool` beside the client's tools. keep_tokens: the oldest
    answers are forgotten above so many tokens; None: none is.
    """

    def __init__(self, chat: Chat, *, offers_refusal: bool = True, keep_tokens: int | None = None) -> None:
        self._chat, self._offers_refusal, self._keep_tokens = chat, offers_refusal, keep_tokens
        self.turns: list[SampledTurn] = []  # in the order in which they were given, the forgotten left out
        self._by_digest: dict[bytes, list[SampledTurn]] = {}
        self._tokens = 0

    def prompt(self, messages: Sequence[Mapping[str, JsonValue]], tools: Sequence[ToolSchema]) -> Prompt:
        """A request in tokens. UserError where its messages cannot be read or written by the template."""
        names = [_name(tool) for tool in tools]
        offered = [] if REFUSAL_TOOL in names or not self._offers_refusal else [REFUSAL_SCHEMA]
        shown = (*tools, *offered)
        plain = _readable(messages)
        digests = self._digests(plain, shown)
        base, ids, opened = None, np.zeros(0, np.int64), False
        talk: Conversation | None = None
        for index in range(len(plain) - 2, -1, -1):
            rest = plain[index + 1 :]
            if plain[index]["role"] != "assistant" or rest[0]["role"] not in ("tool", "user"):
                continue
            if (base := self._given(digests[index], plain[index])) is not None:
                talk = base.prompt.talk.copy()
                ended = base.completion.token_ids[-1] in self._chat.stop_token_ids
                following = [{k: v for k, v in message.items() if k != "tool_call_id"} for message in rest]
                ids, opened = talk.following(following, ended=bool(ended))
                ids = np.concatenate([base.token_ids, ids])
                break
        if talk is None:
            talk = self._chat.conversation(plain, shown)
            ids, opened = talk.prompt
        return Prompt(
            base, ids, opened, tuple(plain), shown, REFUSAL_TOOL in names, talk, digests[-1], digests[0]
        )

    def add(self, prompt: Prompt, completion: Completion, answer: Answer) -> SampledTurn:
        """Remember an answer that a client was given."""
        turn = SampledTurn(prompt, completion, answer)
        self.turns.append(turn)
        digest = self._next(prompt.digest, _readable([answer.message()])[0])
        self._by_digest.setdefault(digest, []).append(turn)
        self._tokens += len(turn.token_ids)
        while self._keep_tokens is not None and self._tokens > self._keep_tokens and len(self.turns) > 1:
            self._forget(next(iter(self._by_digest)))
        return turn

    def _forget(self, digest: bytes) -> None:
        gone = self._by_digest.pop(digest)
        self._tokens -= sum(len(turn.token_ids) for turn in gone)
        self.turns = [turn for turn in self.turns if turn not in gone]

    def _given(self, digest: bytes, message: Message) -> SampledTurn | None:
        """The answer that a client's message repeats; None where it is none, or may be either of two."""
        text = str(message.get("content") or "")
        said = parse_turn(text, self._chat.call_format)
        thought = message.get("reasoning_content", said.plan)
        found = [
            turn
            for turn in self._by_digest.get(digest, ())
            if thought in (None, turn.answer.plan) and said.check in (None, turn.answer.check)
        ]
        different = {(turn.prompt.token_ids.tobytes(), turn.completion.token_ids.tobytes()) for turn in found}
        return found[-1] if len(different) == 1 else None

    def _digests(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[bytes]:
        """Of each message, a digest of it and of all that is before it."""
        digest, found = hashlib.sha256(json.dumps(tools).encode()).digest(), []
        for message in messages:
            digest = self._next(digest, message)
            found.append(digest)
        return found

    def _next(self, digest: bytes, message: Message) -> bytes:
        text = str(message.get("content") or "")
        if message["role"] == "assistant":  # its thoughts may be left out, or written into the text
            in_plan = begins_in_plan(text, self._chat.call_format)
            head = parse_turn(text, self._chat.call_format, think_is_open=in_plan)
            text = text[head.action_start :]
        said = [message["role"], text.strip(), message.get("tool_calls"), message.get("tool_call_id")]
        return hashlib.sha256(digest + json.dumps(said, sort_keys=True).encode()).digest()


def _readable(messages: Sequence[Mapping[str, JsonValue]]) -> list[Message]:
    """Messages with what is read of them alone, in one form; a tool's with the name of its tool."""
    found: list[Message] = []
    names: dict[JsonValue, JsonValue] = {}
    for given in messages:
        message = {key: given[key] for key in _READ if key in given}
        if not message.get("content") and isinstance(given.get("refusal"), str):
            message["content"] = given["refusal"]
        message = plain_message(message)
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict) and isinstance(function := call.get("function"), dict):
                names[_key(call.get("id"))] = function.get("name")
        if message["role"] == "tool":
            message["name"] = message.get("name") or names.get(_key(message.get("tool_call_id"))) or "tool"
        found.append(message)
    return found


def _key(call_id: JsonValue) -> str:
    return json.dumps(call_id)


def _name(tool: ToolSchema) -> JsonValue:
    function = tool.get("function")
    return function.get("name") if isinstance(function, Mapping) else None
