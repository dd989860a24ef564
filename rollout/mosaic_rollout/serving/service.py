"""Answers chat requests with an engine: in tokens from the request to the answer, many requests at once.

What a client has been given goes into a history (history.py), so that its next request finds the tokens that
were sampled. An answer that nobody waited for any more is in none.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.engine import EngineError
from mosaic_rollout.errors import UserError
from mosaic_rollout.serving.answer import Answer, read_answer
from mosaic_rollout.serving.history import History, Prompt
from mosaic_rollout.serving.protocol import ApiError, ChatRequest
from mosaic_rollout.types import Completion, Engine, Request, SamplingParams

DRAWS = 8
"""How often an answer is drawn until it calls what `tool_choice` asks for."""


@dataclass(frozen=True)
class EpisodeRules:
    """How an episode of training samples, whatever its requests ask for: as the trainer computes."""

    temperature: float
    seed: int
    rollout_id: int
    group_id: int
    max_calls: int


@dataclass(eq=False)
class Session:
    """Those who share a key: an episode, which has rules of its own, or all clients of a server."""

    history: History
    rules: EpisodeRules | None = None
    closed: bool = False
    refused: bool = False  # a request came after the last one that it may have, or did not fit the context
    under_way: set[asyncio.Task[object]] = field(default_factory=set)
    asked: Counter[bytes] = field(default_factory=Counter)  # answers asked for in an episode, by prompt

    def close(self) -> None:
        """No more answers: those under way end, later requests are refused."""
        self.closed = True
        for task in self.under_way:
            task.cancel()


@dataclass(frozen=True)
class Choice:
    """One of the answers to a request."""

    answer: Answer
    completion: Completion
    text: str
    ended: bool  # by itself or by a stop text, not by its token limit

    @property
    def finish_reason(self) -> str:
        return "length" if not self.ended else "tool_calls" if self.answer.calls else "stop"


@dataclass(frozen=True)
class Answered:
    """What a request is answered with."""

    prompt: Prompt
    choices: list[Choice]


Listener = Callable[[Prompt, int, Sequence[int]], None]
"""Told of each token as it is sampled: of which choice of a prompt, and the choice's tokens so far."""


class _Watch:
    """Looks at the tokens of one completion as they come; ends it where a stop text is written."""

    def __init__(self, chat: Chat, stops: Sequence[str], tell: Callable[[Sequence[int]], None]) -> None:
        self._chat, self._stops, self._tell = chat, stops, tell
        self._tail = 4 * max(map(len, stops), default=0) + 4  # tokens: a character has at most four bytes
        self.tokens: list[int] = []

    def __call__(self, token: int, logprob: float) -> bool:
        self.tokens.append(token)
        stopped = (
            self.stop_in(self._chat.decode(self.tokens[-self._tail :])) is not None if self._stops else False
        )
        if not stopped:
            self._tell(self.tokens)
        return stopped

    def stop_in(self, text: str) -> int | None:
        """Where the first stop text in a text begins."""
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)

    def whole(self, completion: Completion) -> Completion:
        """The completion up to its stop text, from an engine that does not watch."""
        seen = len(self.tokens)
        for count in range(seen, len(completion.token_ids)):
            token = int(completion.token_ids[count])
            if token not in self._chat.stop_token_ids and self(token, 0.0):
                ids, logprobs = completion.token_ids[: count + 1], completion.logprobs[: count + 1]
                return replace(completion, token_ids=ids, logprobs=logprobs, finish_reason="stop")
        return completion


@dataclass(frozen=True)
class Service:
    """An engine behind OpenAI's protocol. max_tokens: of an answer whose request names no limit."""

    engine: Engine
    chat: Chat
    model: str
    max_context_tokens: int
    max_tokens: int

    async def answer(
        self, session: Session, asked: ChatRequest, listener: Listener = lambda *_: None
    ) -> Answered:
        """The answers to a request; they are in the session's history then. ApiError where there are none."""
        self._admit(session, asked)
        try:
            prompt = session.history.prompt(asked.messages, asked.shown_tools)
        except UserError as error:
            raise ApiError(f"messages: {error}", param="messages") from None
        room = self.max_context_tokens - len(prompt.token_ids)
        if room < 1:
            session.refused = True
            raise ApiError(
                f"the messages have {len(prompt.token_ids)} tokens, and the maximum context length is "
                f"{self.max_context_tokens}",
                param="messages",
                code="context_length_exceeded",
            )
        wanted = asked.max_completion_tokens or asked.max_tokens or self.max_tokens
        if session.rules is not None:
            wanted = min(wanted, self.max_tokens)
        choices = await self._until_called(session, asked, prompt, min(wanted, room), listener)
        if session.closed:
            raise _over()
        for choice in choices:
            session.history.add(prompt, choice.completion, choice.answer)
        return Answered(prompt, choices)

    def _admit(self, session: Session, asked: ChatRequest) -> None:
        if asked.model != self.model:
            raise ApiError(
                f"there is no model {asked.model!r}; this server has {self.model!r}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        if session.closed:
            raise _over()
        rules = session.rules
        if rules is not None and len(session.history.turns) + asked.n > rules.max_calls:
            session.refused = True
            raise ApiError(
                f"the episode has had its {rules.max_calls} answers (rollout.max_steps)", code="episode_over"
            )

    async def _until_called(
        self, session: Session, asked: ChatRequest, prompt: Prompt, max_tokens: int, listener: Listener
    ) -> list[Choice]:
        """The choices; drawn again while they do not call what they must, of which an episode is free.

        What is drawn until it calls has another distribution than the one that is trained.
        """
        if session.rules is not None or asked.tool_choice in ("auto", "none"):
            return await self._draw(session, asked, prompt, max_tokens, listener, 0)
        for attempt in range(DRAWS):
            choices = await self._draw(session, asked, prompt, max_tokens, lambda *_: None, attempt)
            if all(asked.must_call([call.name for _, call in one.answer.calls]) for one in choices):
                return choices
        raise ApiError(
            f"the model called no such tool in {DRAWS} draws",
            status=422, param="tool_choice", code="tool_choice_not_met",
        )  # fmt: skip

    async def _draw(
        self,
        session: Session,
        asked: ChatRequest,
        prompt: Prompt,
        max_tokens: int,
        listener: Listener,
        attempt: int,
    ) -> list[Choice]:
        rules, before = session.rules, 0
        if rules is not None:  # each has draws of its own, also those that are asked for at once
            before = session.asked[prompt.token_ids.tobytes()]
            session.asked[prompt.token_ids.tobytes()] += asked.n
        top_p = 1.0 if rules else asked.top_p
        temperature = rules.temperature if rules else asked.temperature
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        watches = [
            _Watch(self.chat, asked.stops, lambda tokens, number=number: listener(prompt, number, tokens))
            for number in range(asked.n)
        ]
        requests = [
            Request(
                token_ids=prompt.token_ids,
                sampling=SamplingParams(max_tokens, temperature, self.chat.stop_token_ids, top_p),
                seed=_episode_seed(rules, prompt, before + number) if rules else seed + (attempt << 32),
                rollout_key=rules.rollout_id if rules else number,
                group_key=rules.group_id if rules else int.from_bytes(prompt.opening[:4], "little"),
                watch=watch,
            )
            for number, watch in enumerate(watches)
        ]
        work = asyncio.ensure_future(self.engine.generate(requests))
        session.under_way.add(work)
        try:
            completions = await work
        except EngineError as error:
            raise ApiError(str(error), status=500) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if session.closed and task is not None and not task.cancelling():
                raise _over() from None
            raise
        finally:
            work.cancel()
            session.under_way.discard(work)
        return [
            self._choice(asked, prompt, watch.whole(completion), watch)
            for completion, watch in zip(completions, watches, strict=True)
        ]

    def _choice(self, asked: ChatRequest, prompt: Prompt, completion: Completion, watch: _Watch) -> Choice:
        text = self.chat.turn_text(completion.token_ids.tolist())
        text = text[: watch.stop_in(text)]
        answer = read_answer(
            text,
            self.chat.call_format,
            think_is_open=prompt.think_is_open,
            tools=prompt.tools,
            refusal_is_a_tool=prompt.refusal_is_a_tool,
            one_call=not asked.parallel_tool_calls,
        )
        return Choice(answer, completion, text, completion.finish_reason == "stop")


def _episode_seed(rules: EpisodeRules, prompt: Prompt, number: int) -> int:
    """Of the `number`-th answer that is asked for to a prompt, and of no other prompt."""
    key = f"{rules.seed}/{number}".encode() + np.ascontiguousarray(prompt.token_ids).tobytes()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 2


def _over() -> ApiError:
    return ApiError("the episode is over", status=410, code="episode_over")
