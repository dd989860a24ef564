"""A verifiers environment as one of ours: `env.name = "my_module:load_environment"`.

`verifiers` (MIT; github.com/PrimeIntellect-ai/verifiers), classic interface, version 0.1.14: its datasets,
tools, turns and rubric. 0.4 is another interface and refused by version.
"""

from __future__ import annotations

import json
from typing import cast, get_args

from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.environments.splits import divide, draw, text_key
from mosaic_rollout.environments.user_data import bounded, require_package
from mosaic_rollout.environments.verifiers.conversation import Classic, Conversation
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.loop_thread import LoopThread
from mosaic_rollout.foreign.raised import place, words, written
from mosaic_rollout.foreign.verdicts import finite_float, reward_verdict
from mosaic_rollout.types import JsonValue, Observation, Task, TaskKind, ToolCall, Verdict

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
