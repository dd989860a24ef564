"""One OpenAI-compatible endpoint as a policy: messages and tools in, one assistant message out.

What a server refuses for good, or cannot answer in a number of tries (server.py), is a UserError.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from mosaic_rollout.chat.grammar import SAFETY_CLOSE, SAFETY_OPEN, THINK_CLOSE, THINK_OPEN
from mosaic_rollout.endpoint.parameters import TOO_LONG
from mosaic_rollout.endpoint.server import ChatCompletion, ChatServer, CompletionCall, NoAnswer, TryAgain
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Message, ToolSchema


@dataclass(frozen=True)
class NativeCall:
    """A tool call that the server parsed. `arguments` is the JSON text as it came; "" where none came."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatReply:
    """One assistant message. Plan and check that the server took out of the text are put back before it."""

    text: str
    calls: tuple[NativeCall, ...]
    message: Message  # as the next request's history needs it, without the thought
    prompt_tokens: int  # 0 where the server reports no usage, completion_tokens likewise
    completion_tokens: int
    cut_off: bool  # it ran into its token limit


class ContextFull(Exception):
    """The conversation does not fit the model's context any more."""


@dataclass(frozen=True, kw_only=True)
class ChatEndpoint(ChatServer):
    """Where and how to ask."""

    async def complete(
        self,
        http: httpx.AsyncClient,
        messages: Sequence[Message],
        tools: Sequence[ToolSchema],
        *,
        max_tokens: int,
        seed: int,
    ) -> ChatReply:
        """The next assistant message.

        tools: none: the request has no such field. seed: sent where the temperature is not 0.
        UserError where the server refuses or gives nothing usable; ContextFull where the messages do not fit.
        """
        asked: dict[str, object] = {"messages": list(messages), "max_tokens": max_tokens}
        if tools:
            asked["tools"] = list(tools)
        if self.temperature:
            asked["seed"] = seed % 2**31
        try:
            reply, _ = await self.post(http, asked, self._read)
        except NoAnswer as failure:
            raise UserError(
                f"{self.url} gave no usable answer in {self.retries + 1} tries; the last: {failure}"
            ) from None
        return reply

    def _read(self, response: httpx.Response) -> ChatReply:
        status, shown = response.status_code, self.shown(response)
        if status in (400, 413) and any(sign in response.text.lower() for sign in TOO_LONG):
            raise ContextFull
        if status in (401, 403):
            how = "refuses the key in" if self.api_key else "wants a key; put it into"
            raise UserError(
                f"{self.url} {how} ${self.api_key_env} (HTTP {status} {shown}); "
                f"{self.option('api_key_env')} names another variable"
            )
        if status == 404:
            raise UserError(
                f"{self.url} has no chat completions for model {self.model!r} (HTTP 404 {shown}). The URL is "
                f"the base, for example http://host:8000/v1; {self.option('model_name')} is a name that the "
                "server lists"
            )
        if status != 200:
            raise UserError(f"{self.url} refuses the request: HTTP {status} {shown}")
        reply = _reply(self.completion(response, response.text))
        if not (reply.text or reply.calls or reply.cut_off):
            raise TryAgain(f"an answer without text and calls: {shown!r}")
        return reply


def _reply(completion: ChatCompletion) -> ChatReply:
    """A chat completion as a reply."""
    message = completion.message
    text, thought = message.content or "", message.reasoning_content or message.reasoning
    calls = tuple(_call(number, call) for number, call in enumerate(message.tool_calls or ()))
    kept: Message = {"role": "assistant", "content": text}
    if calls:
        kept["tool_calls"] = [
            {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in calls
        ]
    if message.safety_thoughts:
        text = f"{SAFETY_OPEN}{message.safety_thoughts}{SAFETY_CLOSE}{text}"
    if thought and not _has_plan(text, thought):
        ended = f"{THINK_CLOSE[0]} {THINK_CLOSE[1:]}"  # a thought may quote its own end
        text = f"{THINK_OPEN}{thought.replace(THINK_CLOSE, ended)}{THINK_CLOSE}{text}"
    return ChatReply(
        text, calls, kept, completion.prompt_tokens, completion.completion_tokens, completion.cut_off
    )


def _has_plan(text: str, thought: str) -> bool:
    """Whether a text begins with a plan of its own, or with the thought that the server gives as well."""
    before, closes, _ = text.partition(THINK_CLOSE)
    return bool(closes) and (text.lstrip().startswith(THINK_OPEN) or thought.strip() in before)


def _call(number: int, call: CompletionCall) -> NativeCall:
    arguments = call.function.arguments
    if arguments is None:
        arguments = ""
    elif not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return NativeCall(call.id or f"call_{number}", call.function.name, arguments)
