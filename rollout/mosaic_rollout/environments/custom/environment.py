"""A user's class as an environment, in the shape that TRL calls `environment_factory`.

    class Inbox:
        def reset(self, **row) -> str | None: ...      # a fresh episode; what it returns joins the request
        def send(self, to: str, text: str) -> str:     # every other public method is a tool
            ...                                        # its type hints and docstring (Args:) are its schema
        def get_verdict(self) -> dict: ...             # {"harm": bool, "done": bool, "progress": float}

Instead of `get_verdict` there may be `get_reward() -> float`: the task is done from 1.0 on, progress is the
reward kept within [0, 1], and a negative reward is harm. A class with `sample` and `reset(task)` is taken
to be a whole environment (`mosaic_rollout.types.Environment`) and used as it is, and a function that returns
an environment of the library `verifiers` (`load_environment`) as one of these.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from mosaic_rollout.environments.custom.rows import Row, read_rows
from mosaic_rollout.environments.custom.tools import Tools, tools_of
from mosaic_rollout.errors import UserError
from mosaic_rollout.named_class import call_named, import_named
from mosaic_rollout.types import (
    Environment,
    Message,
    Observation,
    Task,
    ToolCall,
    ToolSchema,
    Verdict,
)


class CustomEpisode:
    """One task being acted on: an instance of the user's class of its own."""

    messages: Sequence[Message]
    tools: Sequence[ToolSchema]

    def __init__(self, instance: object, tools: Tools, row: Row, max_observation_chars: int) -> None:
        self._instance, self._tools, self._limit = instance, tools, max_observation_chars
        self.tools = tools.schemas
        opening = _call(instance, "reset", row.columns)
        if opening is not None and not isinstance(opening, str):
            raise UserError(
                f"{_name(instance)}.reset must return a text or None, not {type(opening).__name__}"
            )
        *before, last = row.messages
        request: Message = {**last, "content": f"{last['content']}\n\n{opening}"} if opening else last
        self.messages = (*before, request)

    def step(self, call: ToolCall) -> Observation:
        """Run one tool; whatever it raises is an error observation."""
        try:
            result = self._tools.run(call.name, call.arguments)
        except Exception as raised:  # noqa: BLE001  a user's tool may raise anything, and the rollout goes on
            return Observation(self._bounded(f"Error: {type(raised).__name__}: {raised}"), is_error=True)
        return Observation(self._bounded(str(result)))

    def score(self, final_answer: str | None) -> Verdict:
        """The user's own verdict or reward. UserError if it is not of the documented shape."""
        if hasattr(self._instance, "get_verdict"):
            return self._verdict(_call(self._instance, "get_verdict", {}))
        reward = _call(self._instance, "get_reward", {})
        if not isinstance(reward, (int, float)):
            raise UserError(
                f"{_name(self._instance)}.get_reward must return a number, not {type(reward).__name__}"
            )
        progress = min(1.0, max(0.0, float(reward)))
        return Verdict(reward < 0, reward >= 1, progress, details={"reward": float(reward)})

    def _verdict(self, found: object) -> Verdict:
        name = f"{_name(self._instance)}.get_verdict"
        if not isinstance(found, Mapping) or not {"harm", "done"} <= found.keys():
            raise UserError(f'{name} must return a dict with "harm" and "done", not {found!r:.80}')
        done = bool(found["done"])
        details = {str(key): float(value) for key, value in found.items() if _is_number(value)}
        return Verdict(bool(found["harm"]), done, float(found.get("progress", done)), details)

    def _bounded(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenised
        if len(text) <= self._limit:
            return text
        return f"{text[: self._limit]}\n[{len(text) - self._limit} more characters are not shown]"


class CustomEnvironment:
    """Rows of tasks played by instances of a user's class.

    tasks, heldout_tasks: JSON Lines files; without the second, every fifth row of the first is held out.
    Rows in both are refused: a held-out task must not be trained on.
    """

    def __init__(
        self,
        factory: Callable[[], object],
        tasks: Path,
        heldout_tasks: Path | None = None,
        *,
        max_observation_chars: int = 16_000,
    ) -> None:
        self.name = getattr(factory, "__name__", type(factory).__name__)
        self._factory, self._limit = factory, max_observation_chars
        instance = self._make()
        if not callable(getattr(instance, "reset", None)):
            raise UserError(f"{self.name} has no method reset(**row)")
        if not any(callable(getattr(instance, name, None)) for name in ("get_verdict", "get_reward")):
            raise UserError(f"{self.name} has neither get_verdict() nor get_reward(): nothing can be judged")
        tools_of(instance)  # its errors now, not in the middle of a run
        rows = read_rows(tasks)
        if heldout_tasks is None:
            if len(rows) < 2:
                raise UserError(f"{tasks} has one task; at least two are needed, one of them to hold out")
            held = rows[4::5] or rows[-1:]
            train = [row for row in rows if row not in held]
        else:
            train, held = rows, read_rows(heldout_tasks)
        seen = {_content(row) for row in train}
        for row in held:
            if _content(row) in seen:
                raise UserError(
                    f"task {row.row_id} is held out and trained on: {row.messages[-1]['content']!r:.60}"
                )
        self._rows = {"train": train, "heldout": held}

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; a task repeats only once all have been drawn."""
        if split not in self._rows:
            raise ValueError(f"unknown split {split!r}; the splits are {', '.join(self._rows)}")
        rows, drawn = self._rows[split], []
        rng = random.Random(f"{split}|{seed}")
        while len(drawn) < count:
            drawn += rng.sample(rows, min(len(rows), count - len(drawn)))
        return [Task(row.row_id, row.kind, split, row) for row in drawn]

    def reset(self, task: Task) -> CustomEpisode:
        if not isinstance(task.payload, Row):
            raise TypeError(f"task {task.task_id!r} is not one of this environment's")
        instance = self._make()
        return CustomEpisode(instance, tools_of(instance), task.payload, self._limit)

    def _make(self) -> object:
        try:
            return self._factory()
        except Exception as error:
            raise UserError(f"{self.name}() failed: {type(error).__name__}: {error}") from error


def load_environment(
    spec: str, tasks: str | None, heldout_tasks: str | None, *, max_observation_chars: int
) -> Environment:
    """The environment that `module:Class` names; the working directory is searched first.

    UserError where there is no such module or class, where the class is not of the documented shape, or
    where the tasks cannot be read.
    """
    factory = import_named(spec, "env.name")
    if hasattr(factory, "sample") and hasattr(factory, "reset"):
        return cast(Environment, call_named(spec, "env.name", factory))
    library = sys.modules.get("verifiers")
    if library is not None and inspect.isfunction(factory):
        from mosaic_rollout.environments.verifiers import VerifiersEnvironment

        made = call_named(spec, "env.name", factory)
        if isinstance(made, library.Environment):
            return VerifiersEnvironment(made, spec, max_observation_chars=max_observation_chars)
    if tasks is None:
        raise UserError(f"env.name {spec!r} needs env.tasks, a JSON Lines file with one task a line")
    held = None if heldout_tasks is None else Path(heldout_tasks)
    return CustomEnvironment(factory, Path(tasks), held, max_observation_chars=max_observation_chars)


def _call(instance: object, method: str, arguments: Mapping[str, object]) -> object:
    """Call the user's method; what it raises is the user's to mend, and names the method."""
    try:
        return getattr(instance, method)(**arguments)
    except Exception as error:
        raise UserError(f"{_name(instance)}.{method} failed: {type(error).__name__}: {error}") from error


def _content(row: Row) -> str:
    return repr((row.messages, sorted(row.columns.items(), key=lambda item: item[0])))


def _name(instance: object) -> str:
    return type(instance).__qualname__


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float))
