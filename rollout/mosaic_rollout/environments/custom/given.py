"""An environment, or its tasks, handed over as objects; guarded as what a configuration names is."""

from __future__ import annotations

import inspect
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

from mosaic_rollout.environments.custom.environment import CustomEnvironment
from mosaic_rollout.environments.custom.whole import WholeEnvironment
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.checks import shown
from mosaic_rollout.foreign.code import get_member
from mosaic_rollout.types import Environment, Episode, Task

Rows: TypeAlias = "Path | Sequence[Mapping[str, object]]"
"""Tasks for a class with reset(**row): a JSON Lines file, or its rows."""


def spec_of(given: object) -> str:
    """`module:Class` of an object, or of the class or function that it is: how a run folder calls it."""
    named = given if inspect.isclass(given) or inspect.isroutine(given) else type(given)
    return f"{named.__module__}:{re.sub(r'[^a-zA-Z0-9_]', '_', named.__name__)}"


def given_environment(
    given: object,
    tasks: Rows | None = None,
    heldout_tasks: Rows | None = None,
    *,
    max_observation_chars: int = 16_000,
) -> Environment:
    """The environment that a user's object is or makes.

    given: an object with `sample` and `reset(task)`, a class of such, an environment of the library
        `verifiers`, or a class or function that makes an object with `reset(**row)`; the last needs tasks.
    UserError where it is none of these, or where tasks do not fit it.
    """
    spec = spec_of(given)
    name = f"env.name {spec!r}"

    def whole(made: object) -> Environment:
        if tasks is not None or heldout_tasks is not None:
            raise UserError(f"{name}: it has tasks of its own, by its sample; leave the rows of tasks out")
        return WholeEnvironment(made, name, max_observation_chars=max_observation_chars)

    library = sys.modules.get("verifiers")
    if library is not None and isinstance(given, library.Environment):
        from mosaic_rollout.environments.verifiers import VerifiersEnvironment

        return VerifiersEnvironment(given, spec, max_observation_chars=max_observation_chars)
    is_whole = all(get_member(given, method, name) is not None for method in ("sample", "reset"))
    if not (inspect.isclass(given) or inspect.isroutine(given)):
        if is_whole:
            return whole(given)
        if get_member(given, "reset", name) is not None or not callable(given):
            raise UserError(
                f"{name}: pass the class itself, or a function that makes one: every rollout needs an "
                "instance of its own. What is used as it is has sample(split, count, seed) and reset(task)"
            )
    factory = cast("Callable[[], object]", given)
    if is_whole:
        return whole(ForeignCode(name).demand(f"{name}()", factory))
    if tasks is None:
        raise UserError(f"{name}: it needs tasks, rows or a JSON Lines file, each with at least a prompt")
    return CustomEnvironment(
        factory, tasks, heldout_tasks, max_observation_chars=max_observation_chars, name=name
    )


class GivenTasks:
    """Some tasks of an environment instead of those that it samples; each is in the split that it names."""

    def __init__(self, environment: Environment, tasks: Sequence[Task]) -> None:
        self.name, self._environment, self._tasks = environment.name, environment, list(tasks)
        names = [(task.split, task.task_id) for task in self._tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"tasks: the id {min(twice)[1]!r} is there more than once; ids must be unique")

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks of a split, a pure function of its arguments; repeated once all have been drawn."""
        there = [task for task in self._tasks if task.split == split]
        if not there:
            raise UserError(
                f"tasks: none of the {len(self._tasks)} tasks has split = {split!r}"
                + ("; set env.eval_tasks = 0 to train without an evaluation" if split == "heldout" else "")
            )
        rng, drawn = random.Random(f"{split}|{seed}"), list[Task]()
        while len(drawn) < count:
            drawn += rng.sample(there, min(len(there), count - len(drawn)))
        return drawn

    def reset(self, task: Task) -> Episode:
        return self._environment.reset(task)


def split_tasks(
    tasks: Sequence[object], what: str = "tasks"
) -> tuple[list[Mapping[str, object]] | None, list[Task] | None]:
    """(rows, Task objects) of a list that holds one kind of them. UserError for anything else."""
    if tasks and all(isinstance(task, Task) for task in tasks):
        return None, cast("list[Task]", list(tasks))
    if tasks and all(isinstance(task, Mapping) for task in tasks):
        return cast("list[Mapping[str, object]]", list(tasks)), None
    raise UserError(
        f'{what} must be a list of rows like {{"prompt": "Book it"}} or of Task, not {shown(tasks)}'
    )
