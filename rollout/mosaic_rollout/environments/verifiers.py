"""A verifiers environment as one of ours: `env.name = "my_module:load_environment"`.

`verifiers` (MIT; github.com/PrimeIntellect-ai/verifiers), classic interface, version 0.1.14: its datasets,
tools, turns and rubric. 0.4 is another interface and refused by version.

`verifiers` calls a model through a client; ours hands the request to the episode and waits for what the
policy does at every turn. So whatever an environment overrides (state, stop conditions, responses) runs as it
does there. Its coroutines run in a thread with an event loop of its own.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast, get_args

from mosaic_rollout.environments.guarded import GuardedEpisode, bounded
from mosaic_rollout.environments.sources import divide, draw, require_package, text_key
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.checks import finite_float, reward_verdict
from mosaic_rollout.foreign.code import LoopThread, caught, place, words, written
from mosaic_rollout.types import (
    JsonValue,
    Message,
    Observation,
    Task,
    TaskKind,
    ToolCall,
    ToolSchema,
    Verdict,
)

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


VERIFIERS_VERSION = "0.1.14"
INSTALL_HINT = f"run `pip install verifiers=={VERIFIERS_VERSION}`"

Row = dict[str, JsonValue]


class VerifiersEpisode(GuardedEpisode):
    """One row being acted on. The environment's user may go on after an answer, its tools may change."""

    def __init__(self, code: ForeignCode, conversation: Conversation, max_observation_chars: int) -> None:
        super().__init__(code, max_observation_chars)
        self._conversation = conversation
        turn = conversation.turn
        if turn is None:
            raise UserError("the verifiers environment ended a rollout before the policy's first turn")
        self.messages, self.tools = turn.messages, turn.tools
        self._verdict: Verdict | None = None

    def next_user_message(self, final_answer: str) -> str | None:
        """What the environment answers; None where it stops there."""
        with self._alone("the environment's answer"):
            return self._take(final_answer, None)

    def _carry_out(self, call: ToolCall) -> Observation:
        """Run one tool call; verifiers turns what a tool raises into the tool's message."""
        text = self._take("", (call.name, json.dumps(call.arguments)))
        return Observation("The episode is over." if text is None else text)

    def _judge(self, final_answer: str | None) -> Verdict:
        """The rubric's reward: done from 1.0 on, progress is the reward within [0, 1], below 0 is harm."""
        if self._verdict is None:
            try:
                reward, metrics = self._conversation.reward()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                where = written(place(error), whole_path=True)
                raise UserError(
                    f"the rubric of the verifiers environment failed ({words(error)}{where}); "
                    "rewards of whole groups are not supported"
                ) from error
            what = f"a metric of the rubric of {self._code.name}"
            details = {name: finite_float(value, f'"{name}", {what},') for name, value in metrics.items()}
            self._verdict = reward_verdict(reward, f"the reward of {self._code.name}", details)
        return self._verdict

    def _take(self, content: str, call: tuple[str, str] | None) -> str | None:
        """Give the policy's turn; the text that came back, None where the rollout is over."""
        self._conversation.reply(content, call)
        turn = self._conversation.turn
        if turn is None:
            return None
        self.tools = turn.tools
        return bounded(turn.news(), self._limit)


class VerifiersEnvironment:
    """Rows of a verifiers environment's datasets; its evaluation set is held out, else a fifth of its rows.

    A row whose `info` has a `kind` (harmful, benign, injected) is a task of that kind, any other is benign.

    Raises EnvironmentMissing where verifiers is there in another version.
    """

    def __init__(self, environment: Classic, name: str, *, max_observation_chars: int = 16_000) -> None:
        require_package("verifiers", VERIFIERS_VERSION, INSTALL_HINT)
        self.name, self._environment, self._limit = name, environment, max_observation_chars
        self._code = ForeignCode(f"env.name {name!r}")
        self._thread = LoopThread()
        train, held = environment.build_dataset(), environment.build_eval_dataset()
        if train is None:
            raise UserError(f"{name}: the verifiers environment has no dataset to train on")
        rows = divide(list(train), None if held is None else list(held), _leak_key, 0.2)
        self._pools = {
            split: [_task(row, index, split) for index, row in enumerate(members)]
            for split, members in rows.items()
        }

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; repeats only once all have been drawn."""
        return draw(self._pools, split, count, seed)

    def reset(self, task: Task) -> VerifiersEpisode:
        """A fresh rollout of a row. UserError where the environment fails before the first turn."""
        if not isinstance(task.payload, dict):
            raise TypeError(f"{task.task_id} is not a task of {self.name}")
        try:
            conversation = Conversation(self._thread, self._environment, cast(Row, task.payload))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            where = written(place(error), whole_path=True)
            raise UserError(f"{self.name} failed to open {task.task_id}: {words(error)}{where}") from error
        return VerifiersEpisode(self._code, conversation, self._limit)


def _task(row: Row, index: int, split: str) -> Task:
    info = row.get("info")
    if isinstance(info, str):
        try:
            info = json.loads(info)
        except (ValueError, RecursionError) as error:
            raise UserError(f"row {index}: info is a text and not JSON ({error})") from None
    kind = info.get("kind", "benign") if isinstance(info, dict) else "benign"
    if kind not in get_args(TaskKind):
        raise UserError(
            f"row {index}: info.kind is {kind!r}; it must be one of {', '.join(get_args(TaskKind))}"
        )
    return Task(f"{split}-{row.get('example_id', index)}", cast(TaskKind, kind), split, row)


def _leak_key(row: Row) -> str:
    """Rows of one prompt are not divided."""
    return text_key(json.dumps(row.get("prompt"), sort_keys=True, default=str))
