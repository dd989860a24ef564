"""A verifiers environment as one of ours: `env.name = "my_module:load_environment"`.

`verifiers` (MIT; github.com/PrimeIntellect-ai/verifiers), classic interface, version 0.1.14: its datasets,
tools, turns and rubric. 0.4 is another interface and refused by version.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast, get_args

from mosaic_rollout.environments.packages import require_package
from mosaic_rollout.environments.splits import divide, draw, text_key
from mosaic_rollout.environments.texts import bounded
from mosaic_rollout.environments.verifiers.conversation import Classic, Conversation, LoopThread
from mosaic_rollout.errors import UserError
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

VERIFIERS_VERSION = "0.1.14"
INSTALL_HINT = f"run `pip install verifiers=={VERIFIERS_VERSION}`"

Row = dict[str, JsonValue]


class VerifiersEpisode:
    """One row being acted on. The environment's user may go on after an answer, its tools may change."""

    messages: Sequence[Message]
    tools: Sequence[ToolSchema]

    def __init__(self, conversation: Conversation, max_observation_chars: int) -> None:
        self._conversation, self._limit = conversation, max_observation_chars
        turn = conversation.turn
        if turn is None:
            raise UserError("the verifiers environment ended a rollout before the policy's first turn")
        self.messages, self.tools = turn.messages, turn.tools
        self._verdict: Verdict | None = None

    def step(self, call: ToolCall) -> Observation:
        """Run one tool call; verifiers turns what a tool raises into the tool's message."""
        return Observation(self._take("", (call.name, json.dumps(call.arguments))) or "The episode is over.")

    def next_user_message(self, final_answer: str) -> str | None:
        """What the environment answers; None where it stops there."""
        return self._take(final_answer, None)

    def score(self, final_answer: str | None) -> Verdict:
        """The rubric's reward: done from 1.0 on, progress is the reward within [0, 1], below 0 is harm."""
        if self._verdict is None:
            try:
                reward, metrics = self._conversation.reward()
            except Exception as error:
                raise UserError(
                    f"the rubric of the verifiers environment failed ({type(error).__name__}: {error}); "
                    "rewards of whole groups are not supported"
                ) from error
            progress = min(1.0, max(0.0, reward))
            self._verdict = Verdict(reward < 0, reward >= 1, progress, {**metrics, "reward": reward})
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
        except Exception as error:
            raise UserError(
                f"{self.name} failed to open {task.task_id}: {type(error).__name__}: {error}"
            ) from error
        return VerifiersEpisode(conversation, self._limit)


def _task(row: Row, index: int, split: str) -> Task:
    info = row.get("info")
    if isinstance(info, str):
        info = json.loads(info)
    kind = info.get("kind", "benign") if isinstance(info, dict) else "benign"
    if kind not in get_args(TaskKind):
        raise UserError(
            f"row {index}: info.kind is {kind!r}; it must be one of {', '.join(get_args(TaskKind))}"
        )
    return Task(f"{split}-{row.get('example_id', index)}", cast(TaskKind, kind), split, row)


def _leak_key(row: Row) -> str:
    """Rows of one prompt are not divided."""
    return text_key(json.dumps(row.get("prompt"), sort_keys=True, default=str))
