"""Answers as OpenAI's objects: whole, or in chunks while they are sampled."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.serving.answer import settled, undecided, written_call
from mosaic_rollout.serving.history import Prompt
from mosaic_rollout.serving.protocol import ChatRequest
from mosaic_rollout.serving.service import Answered, Choice, Service, Session

_LEAST = -9999.0  # as OpenAI writes a log-prob that JSON has no number for
_SHARE = 50
"""A turn so far is decoded again once it has grown by a 50th: in all, as often as a turn has tokens."""


@dataclass(frozen=True)
class Head:
    """What an answer is called, and when it was made."""

    model: str
    name: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, kind: str, choices: Sequence[object], **more: object) -> dict[str, object]:
        named = {"id": self.name, "object": kind, "created": self.created, "model": self.model}
        return {**named, "choices": list(choices), **more}


def whole_answer(answered: Answered, asked: ChatRequest, head: Head, chat: Chat) -> dict[str, object]:
    """The answer to a request that is no stream."""
    choices = [
        {
            "index": number,
            "message": choice.answer.message(),
            "finish_reason": choice.finish_reason,
            "logprobs": _logprobs(choice, chat) if asked.logprobs else None,
        }
        for number, choice in enumerate(answered.choices)
    ]
    return head.object("chat.completion", choices, usage=_usage(answered))


async def chunks(
    service: Service, session: Session, asked: ChatRequest, head: Head, gone: asyncio.Event
) -> AsyncIterator[dict[str, object]]:
    """The answer in chunks: what is settled of a plan and of a text at once, calls when they are whole.

    gone: set where nobody listens any more. ApiError as of Service.answer.
    """
    grown, sampled = asyncio.Event(), dict[int, tuple[Prompt, Sequence[int]]]()

    def listen(prompt: Prompt, number: int, tokens: Sequence[int]) -> None:
        sampled[number] = prompt, tokens
        grown.set()

    work = asyncio.ensure_future(service.answer(session, asked, listen))
    work.add_done_callback(lambda _: grown.set())
    sent = [_Sent(service.chat, asked.stops) for _ in range(asked.n)]
    begun = False

    def chunk(number: int, delta: dict[str, object], **more: object) -> dict[str, object]:
        choice = {"index": number, "delta": delta, "finish_reason": None, **more}
        return head.object("chat.completion.chunk", [choice])

    try:
        while not gone.is_set():
            await grown.wait()
            grown.clear()
            if work.done():
                work.result()  # raises its mistake before anything is told
            if not begun:
                begun = True
                for number in range(asked.n):
                    yield chunk(number, {"role": "assistant", "content": ""})
            if work.done():
                break
            for number, (prompt, tokens) in list(sampled.items()):
                for delta in sent[number].news(tokens, think_is_open=prompt.think_is_open):
                    yield chunk(number, delta)
        if not work.done():
            return
        answered = work.result()
        for number, choice in enumerate(answered.choices):
            for delta in sent[number].rest(choice):
                yield chunk(number, delta)
            logprobs = _logprobs(choice, service.chat) if asked.logprobs else None
            yield chunk(number, {}, finish_reason=choice.finish_reason, logprobs=logprobs)
        if asked.stream_options.include_usage:
            yield head.object("chat.completion.chunk", [], usage=_usage(answered))
    finally:
        work.cancel()


class _Sent:
    """What a stream has told of one choice."""

    def __init__(self, chat: Chat, stops: Sequence[str]) -> None:
        self._chat, self._stops = chat, stops
        self._plan, self._content = "", ""
        self._read = 0  # tokens

    def news(self, tokens: Sequence[int], *, think_is_open: bool) -> Iterator[dict[str, object]]:
        """What is settled and not yet told of a choice's tokens so far."""
        if len(tokens) < self._read + max(1, self._read // _SHARE):
            return
        self._read = len(tokens)
        text = self._chat.decode(tokens).rstrip("\ufffd")  # of a character of which a part is there
        text = text[: undecided(text, 0, self._stops)]
        yield from self._tell(*settled(text, self._chat.call_format, think_is_open=think_is_open))

    def rest(self, choice: Choice) -> Iterator[dict[str, object]]:
        """What is left to tell of a whole choice."""
        answer = choice.answer
        yield from self._tell(answer.plan or "", answer.content or "")
        if answer.calls:
            calls = [written_call(name, call) for name, call in answer.calls]
            yield {"tool_calls": [{"index": place, **call} for place, call in enumerate(calls)]}
        for name, text in (("safety_thoughts", answer.check), ("refusal", answer.refusal)):
            if text is not None:
                yield {name: text}

    def _tell(self, plan: str, content: str) -> Iterator[dict[str, object]]:
        if len(plan) > len(self._plan):
            yield {"reasoning_content": plan[len(self._plan) :]}
            self._plan = plan
        if len(content) > len(self._content):
            yield {"content": content[len(self._content) :]}
            self._content = content


def _usage(answered: Answered) -> dict[str, object]:
    prompt = len(answered.prompt.token_ids)
    sampled = sum(len(choice.completion.token_ids) for choice in answered.choices)
    cached = max(choice.completion.cached_tokens for choice in answered.choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _logprobs(choice: Choice, chat: Chat) -> dict[str, object]:
    """Every token that was sampled, thoughts, calls and the end of the turn included."""
    rows = []
    for token, logprob in zip(choice.completion.token_ids, choice.completion.logprobs, strict=True):
        text = chat.decode([int(token)])
        value = max(_LEAST, float(logprob))
        rows.append({"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": rows, "refusal": None}
