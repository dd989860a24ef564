"""A rollout of a verifiers environment that waits for the policy at every turn.

`verifiers` calls a model through a client; ours hands the request to the episode and waits for what the
policy does. So whatever an environment overrides (state, stop conditions, responses) runs as it does there.
Its coroutines run in a thread with an event loop of its own.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from mosaic_rollout.foreign.loop_thread import LoopThread, caught
from mosaic_rollout.types import JsonValue, Message, ToolSchema

State = dict[str, object]


class Dumpable(Protocol):
    """A pydantic model of verifiers: a message or a tool."""

    def model_dump(self) -> dict[str, JsonValue]: ...


class Rubric(Protocol):
    """verifiers.Rubric."""

    async def score_rollout(self, state: State) -> None: ...


class Classic(Protocol):
    """verifiers.Environment, what is used of it."""

    rubric: Rubric

    def build_dataset(self) -> Sequence[dict[str, JsonValue]] | None: ...
    def build_eval_dataset(self) -> Sequence[dict[str, JsonValue]] | None: ...
    async def rollout(
        self,
        input: Mapping[str, JsonValue],
        client: object,
        model: str,
        sampling_args: Mapping[str, JsonValue],
    ) -> State: ...


@dataclass(frozen=True)
class Turn:
    """What the environment asks of the policy: the conversation so far and the tools as they are now."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...]

    def news(self) -> str:
        """The text of what came after the policy's last turn."""
        texts: list[str] = []
        for message in reversed(self.messages):
            if message["role"] == "assistant":
                break
            texts.append(str(message["content"]))
        return "\n".join(reversed(texts))


class Conversation:
    """One rollout under way. `turn` is what it waits with; None once it is over."""

    def __init__(self, thread: LoopThread, environment: Classic, row: Mapping[str, JsonValue]) -> None:
        self._thread, self._environment = thread, environment
        self._asked: queue.SimpleQueue[Turn | None] = queue.SimpleQueue()
        self._replies: asyncio.Queue[object] = asyncio.Queue()  # a message, or None: there is no more
        work = environment.rollout(copy.deepcopy(dict(row)), _client(self._ask), "policy", {})
        self._rollout = asyncio.run_coroutine_threadsafe(caught(work), thread.loop)
        self._rollout.add_done_callback(lambda _: self._asked.put(None))
        self.turn = self._asked.get()
        if self.turn is None:
            self._ended()  # what went wrong before the first turn

    def reply(self, content: str, call: tuple[str, str] | None = None) -> None:
        """Give the policy's turn, a text or a call as (name, JSON arguments); `turn` is the next one then."""
        if self.turn is not None:
            self._answer(_response(content, call))

    def reward(self) -> tuple[object, dict[str, object]]:
        """End the rollout and score it: the rubric's reward and its metrics, as it gave them."""
        if self.turn is not None:
            self._answer(None)
        state = self._ended()
        self._thread.run(self._environment.rubric.score_rollout(state))
        return state.get("reward"), dict(cast("Mapping[str, object]", state.get("metrics") or {}))

    def _ended(self) -> State:
        """The rollout's last state. Raises what it raised."""
        state, error = self._rollout.result()
        if error is not None:
            raise error
        return cast(State, state)

    def _answer(self, response: object) -> None:
        self._thread.loop.call_soon_threadsafe(self._replies.put_nowait, response)
        self.turn = self._asked.get()

    async def _ask(self, messages: Sequence[Dumpable], tools: Sequence[Dumpable] | None) -> object:
        """Called by the client, in the loop's thread: a request goes out, the policy's turn comes back."""
        shown = tuple(_message(message.model_dump()) for message in messages)
        self._asked.put(Turn(shown, tuple(_schema(tool.model_dump()) for tool in tools or ())))
        return await self._replies.get()


def _client(ask: object) -> object:
    """A verifiers client that asks us. Its class is made here, since verifiers is imported only when used."""
    base = importlib.import_module("verifiers.clients.client").Client
    error = importlib.import_module("verifiers.errors").Error

    async def get_response(
        self: object,
        prompt: Sequence[Dumpable],
        model: str,
        sampling_args: object,
        tools: object = None,
        **_: object,
    ) -> object:
        response = await ask(prompt, tools)  # type: ignore[operator]
        if response is None:
            raise error("the policy takes no further turn")
        return response

    async def unused(self: object, *_: object, **__: object) -> None:
        return None

    methods = dict.fromkeys(base.__abstractmethods__, unused)
    return type("PolicyClient", (base,), {**methods, "get_response": get_response})(None)


def _response(content: str, call: tuple[str, str] | None) -> object:
    types = importlib.import_module("verifiers.types")
    calls = None if call is None else [types.ToolCall(id="call", name=call[0], arguments=call[1])]
    message = types.ResponseMessage(
        content=content,
        tool_calls=calls,
        finish_reason="stop" if call is None else "tool_calls",
        is_truncated=False,
    )
    return types.Response(id="turn", created=0, model="policy", message=message)


def _message(found: Mapping[str, JsonValue]) -> Message:
    """An OpenAI message with text content; parts that are no text are named."""
    content = found.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        content = "".join(str(part.get("text", f"[{part.get('type')}]")) for part in parts)
    message: Message = {"role": found["role"], "content": content or ""}
    if isinstance(calls := found.get("tool_calls"), list) and calls:
        message["tool_calls"] = [_call(call) for call in calls if isinstance(call, Mapping)]
    if isinstance(call_id := found.get("tool_call_id"), str):
        message["tool_call_id"] = call_id
    return message


def _call(call: Mapping[str, JsonValue]) -> JsonValue:
    """A call of an opening message in OpenAI's form."""
    function = {"name": call.get("name"), "arguments": call.get("arguments")}
    return {"id": call.get("id"), "type": "function", "function": function}


def _schema(tool: Mapping[str, JsonValue]) -> ToolSchema:
    function = {name: tool[name] for name in ("name", "description", "parameters")}
    return {"type": "function", "function": function}
