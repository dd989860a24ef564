"""One OpenAI-compatible endpoint as a policy: messages and tools in, one assistant message out.

Tried again, a bounded number of times: no connection, silence, 408, 409, 425, 429, 5xx, and a body that is no
chat completion. Anything else the server refuses is a UserError at once. The key is sent as a header and
appears in no message of this program.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from pydantic import BaseModel, Field, NonNegativeInt

from mosaic_rollout.errors import UserError
from mosaic_rollout.grammar import THINK_CLOSE, THINK_OPEN
from mosaic_rollout.no_cookies import no_cookies
from mosaic_rollout.types import Message, ToolSchema

_CONNECT_S = 10.0
_LONGEST_WAIT_S = 60.0  # between two tries
_BODY_SHOWN = 300  # characters of a server's complaint
_TRIED_AGAIN = (408, 409, 425, 429)
_TOO_LONG = ("context_length_exceeded", "maximum context length", "longer than the model", "context length")


@dataclass(frozen=True)
class NativeCall:
    """A tool call that the server parsed. `arguments` is the JSON text as it came."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatReply:
    """One assistant message. A thought that the server took out of the text is put back in front of it."""

    text: str
    calls: tuple[NativeCall, ...]
    message: Message  # as the next request's history needs it, without the thought
    prompt_tokens: int  # 0 where the server reports no usage, completion_tokens likewise
    completion_tokens: int
    cut_off: bool  # it ran into its token limit


class ContextFull(Exception):
    """The conversation does not fit the model's context any more."""


class _TryAgain(Exception):
    """This try failed in a way that the next may not. `wait_s`: what the server asked for."""

    def __init__(self, what: str, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s


@dataclass(frozen=True)
class ChatEndpoint:
    """Where and how to ask. `url`: the base that ends in /v1. `api_key_env`: where the key came from."""

    url: str
    model: str
    api_key: str | None
    api_key_env: str
    temperature: float = 0.0
    timeout_s: float = 120.0
    retries: int = 4
    backoff_s: float = 1.0

    def open(self) -> httpx.AsyncClient:
        """A client to ask with; use it as a context manager. UserError for a key no header can carry."""
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError(f"the key in ${self.api_key_env} has characters that no HTTP header can carry")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx.Timeout(self.timeout_s, connect=min(_CONNECT_S, self.timeout_s))
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, cookies=no_cookies())

    async def complete(
        self,
        http: httpx.AsyncClient,
        messages: Sequence[Message],
        tools: Sequence[ToolSchema],
        *,
        max_tokens: int,
        seed: int,
    ) -> ChatReply:
        """The next assistant message, within `retries` + 1 tries.

        tools: none: the request has no such field. seed: sent where the temperature is not 0.
        UserError where the server refuses or gives nothing usable; ContextFull where the messages do not fit.
        """
        body = self._body(messages, tools, max_tokens, seed)
        reason = ""
        for attempt in range(self.retries + 1):
            asked_s = 0.0
            try:
                async with asyncio.timeout(self.timeout_s):
                    response = await http.post(self._address, json=body)
                return self._read(response)
            except _TryAgain as failure:
                reason, asked_s = str(failure), failure.wait_s
            except TimeoutError:
                reason = f"no answer within {self.timeout_s:g} s"
            except httpx.RequestError as error:  # a broken compression or a redirect among them
                reason = f"{type(error).__name__} {error}".strip()
            if attempt < self.retries:
                wait_s = (
                    self.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
                )  # apart, lest all return at once
                await asyncio.sleep(min(max(wait_s, asked_s), _LONGEST_WAIT_S))
        raise UserError(
            f"{self.url} gave no usable answer in {self.retries + 1} tries; the last: {self._hide(reason)}"
        )

    @property
    def _address(self) -> str:
        return self.url.rstrip("/") + "/chat/completions"

    def _body(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], max_tokens: int, seed: int
    ) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": max_tokens,
        }
        if tools:
            body["tools"] = list(tools)
        if self.temperature:
            body["seed"] = seed % 2**31
        return body

    def _read(self, response: httpx.Response) -> ChatReply:
        status, shown = response.status_code, self._hide(response.text)[:_BODY_SHOWN]
        if status in _TRIED_AGAIN or status >= 500:
            raise _TryAgain(f"HTTP {status} {shown}", _retry_after(response))
        if status in (400, 413) and any(sign in response.text.lower() for sign in _TOO_LONG):
            raise ContextFull
        if status in (401, 403):
            how = "refuses the key in" if self.api_key else "wants a key; put it into"
            raise UserError(
                f"{self.url} {how} ${self.api_key_env} (HTTP {status} {shown}); "
                "--api-key-env names another variable"
            )
        if status == 404:
            raise UserError(
                f"{self.url} has no chat completions for model {self.model!r} (HTTP 404 {shown}). The URL is "
                "the base, for example http://host:8000/v1; --model-name is a name that the server lists"
            )
        if status != 200:
            raise UserError(f"{self.url} refuses the request: HTTP {status} {shown}")
        try:
            return _reply(_Completion.model_validate_json(response.content))
        except ValueError:  # pydantic's own is one
            raise _TryAgain(f"not a chat completion: {shown!r}") from None

    def _hide(self, text: str) -> str:
        return text.replace(self.api_key, "***") if self.api_key else text


class _Function(BaseModel):
    name: str
    arguments: str | dict[str, object] | None = None


class _ToolCall(BaseModel):
    id: str | None = None
    function: _Function


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None


class _Completion(BaseModel):
    """What is read of a chat completion."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def _reply(completion: _Completion) -> ChatReply:
    """A chat completion as a reply. ValueError where its message is empty."""
    choice, usage = completion.choices[0], completion.usage or _Usage()
    message = choice.message
    text, thought = message.content or "", message.reasoning_content or message.reasoning
    calls = tuple(_call(number, call) for number, call in enumerate(message.tool_calls or ()))
    cut_off = choice.finish_reason == "length"
    if not (text or calls or thought or cut_off):
        raise ValueError("an answer without text and calls")
    kept: Message = {"role": "assistant", "content": text}
    if calls:
        kept["tool_calls"] = [
            {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in calls
        ]
    if thought and THINK_CLOSE not in text:
        text = f"{THINK_OPEN}{thought}{THINK_CLOSE}{text}"
    return ChatReply(text, calls, kept, usage.prompt_tokens or 0, usage.completion_tokens or 0, cut_off)


def _call(number: int, call: _ToolCall) -> NativeCall:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {})
    return NativeCall(call.id or f"call_{number}", call.function.name, arguments)


def _retry_after(response: httpx.Response) -> float:
    """Seconds a server asks to wait; dates and nonsense count as none."""
    try:
        return max(0.0, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
