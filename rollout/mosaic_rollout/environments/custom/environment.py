"""A user's class as an environment, in the shape that TRL calls `environment_factory`.

    class Inbox:
        def reset(self, **row) -> str | None: ...      # a fresh episode; what it returns joins the request
        def send(self, to: str, text: str) -> str:     # every other public method is a tool
            ...                                        # its type hints and docstring (Args:) are its schema
        def get_verdict(self) -> dict: ...             # {"harm": bool, "done": bool, "progress": float}
        def demonstrate(self, task): ...               # optional: the turns of an agent that does it well

Instead of `get_verdict` there may be `get_reward() -> float`: the task is done from 1.0 on, progress is the
reward kept within [0, 1], and a negative reward is harm. A class with `sample` and `reset(task)` is taken
to be a whole environment (`mosaic_rollout.types.Environment`) and used as it is, and a function that returns
an environment of the library `verifiers` (`load_environment`) as one of these.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from mosaic_rollout.chat.grammar import REFUSAL_TOOL
from mosaic_rollout.environments.attacks import Attack
from mosaic_rollout.environments.custom.moves import shown_moves
from mosaic_rollout.environments.custom.rows import Row, RowTasks
from mosaic_rollout.environments.custom.whole import WholeEnvironment
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.checks import dict_verdict, reward_verdict
from mosaic_rollout.foreign.code import (
    call_named,
    get_member,
    get_method,
    import_named,
    place_of,
    words,
    written,
)
from mosaic_rollout.types import Environment, Message, Moves, Observation, Task, ToolCall, ToolSchema, Verdict

RESERVED = ("reset", "get_reward", "get_verdict", "demonstrate")
"""Public methods that are no tools: the loop calls them."""
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Tools:
    """What the policy may call on an object, and how it is told."""

    schemas: tuple[ToolSchema, ...]
    methods: dict[str, Callable[..., object]]

    def method(self, name: str) -> Callable[..., object]:
        """The method of a name. ValueError where no tool has it."""
        if name not in self.methods:
            raise ValueError(f"no tool is named {name!r}")
        return self.methods[name]


def tool_names(kind: type) -> list[str]:
    """Public methods of a class but the reserved ones, as they are defined, inherited ones last."""
    names: dict[str, None] = {}
    for base in kind.__mro__[:-1]:
        for name, value in vars(base).items():
            if not name.startswith("_") and name not in RESERVED and _is_method(value):
                names[name] = None
    return list(names)


def tools_of(instance: object) -> Tools:
    """UserError names the method that cannot be a tool, or whose hints or docstring do not describe it."""
    schemas, methods = [], {}
    for name in tool_names(type(instance)):
        what = f"{type(instance).__qualname__}.{name}"
        method = get_member(instance, name, type(instance).__qualname__)
        if not callable(method):
            continue  # a subclass or the instance has something else under this name
        refuse_generator(method, what)
        _refuse_unnamed(method, what)
        if name == REFUSAL_TOOL:
            raise UserError(f"{what} has the name of the tool with which the policy refuses; rename it")
        try:
            schema = get_json_schema(method)
        except (DocstringParsingException, TypeHintParsingException, TypeError, ValueError) as error:
            raise UserError(
                f"{what} is public and so a tool, but {error} "
                "Give it type hints and a docstring with an Args: section, or a name that begins with _"
            ) from None
        except Exception as error:  # type hints are code of the user's, too
            raise UserError(
                f"{what} is public and so a tool, but cannot be described: {words(error)}"
                f"{written(place_of(method), whole_path=True)}"
            ) from error
        schemas.append(cast(ToolSchema, schema))
        methods[name] = method
    return Tools(tuple(schemas), methods)


def refuse_generator(method: Callable[..., object] | None, what: str) -> None:
    """UserError for a function with a yield: calling it does nothing."""
    inner = inspect.unwrap(method) if method is not None else None
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise UserError(
            f"{what} is a generator{written(place_of(inner), whole_path=True)}; it must return, not yield"
        )


def _refuse_unnamed(method: Callable[..., object], what: str) -> None:
    """UserError for parameters that a call with named arguments cannot reach, or whose names nobody knows."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return  # describing it fails next, and says so
    for parameter in parameters:
        if parameter.kind not in _BY_NAME:
            mark = str(parameter).partition(parameter.name)[0]  # "*", "**" or nothing
            kind = "any number of arguments" if mark else "an argument by its position only"
            raise UserError(
                f"{what} is public and so a tool, but takes {kind} ({mark}{parameter.name}); "
                "a tool's arguments have names: write them out, or give it a name that begins with _"
            )


def _is_method(value: object) -> bool:
    """A function of a class, also behind a decorator of functools that keeps its signature."""
    if inspect.isfunction(value) or isinstance(value, (staticmethod, classmethod, functools.partialmethod)):
        return True
    return callable(value) and not isinstance(value, type) and hasattr(value, "__wrapped__")


class CustomEpisode(GuardedEpisode):
    """One task being acted on: an instance of the user's class of its own."""

    def __init__(
        self, code: ForeignCode, instance: object, tools: Tools, row: Row, max_observation_chars: int
    ) -> None:
        super().__init__(code, max_observation_chars)
        self._instance, self._tools, self._row = instance, tools, row
        self.tools = tools.schemas
        opening = self._call("reset", copy.deepcopy(row.columns))
        if opening is not None and not isinstance(opening, str):
            raise UserError(
                f"{_name(instance)}.reset must return a text or None, not {type(opening).__name__}"
            )
        *before, last = copy.deepcopy(row.messages)
        request: Message = {**last, "content": f"{last['content']}\n\n{opening}"} if opening else last
        self.messages = (*before, request)

    def demonstrate(self) -> Moves:
        """The turns that the user's class shows for the task's row. UserError where it has no such method."""
        name, row = _name(self._instance), self._row
        found = get_method(self._instance, "demonstrate", name)
        if found is None:
            raise UserError(f"{name} has no method demonstrate(task), so it shows no turns")
        task = {"prompt": row.messages[-1]["content"], "kind": row.kind, **copy.deepcopy(row.columns)}
        return shown_moves(self._code, f"{name}.demonstrate", found, task)

    def _carry_out(self, call: ToolCall) -> Observation:
        return Observation(str(self._code.run(self._tools.method(call.name), **call.arguments)))

    def _judge(self, final_answer: str | None) -> Verdict:
        """The user's own verdict or reward. UserError if it is not of the documented shape."""
        if get_method(self._instance, "get_verdict", _name(self._instance)):
            return self._verdict(self._call("get_verdict", {}))
        what = f"the reward of {_name(self._instance)}.get_reward"
        return reward_verdict(self._call("get_reward", {}), what)

    def _verdict(self, found: object) -> Verdict:
        return dict_verdict(found, f"{_name(self._instance)}.get_verdict")

    def _call(self, method: str, arguments: Mapping[str, object]) -> object:
        """Call the user's method; what it raises is the user's to mend, and names the method."""
        name = _name(self._instance)
        found = get_method(self._instance, method, name)
        if found is None:
            raise UserError(f"{name} has no method {method} any more")
        return self._code.demand(f"{name}.{method}", found, **arguments)


class CustomEnvironment:
    """Rows of tasks played by instances of a user's class.

    tasks, heldout_tasks: JSON Lines files, or their rows; without the second, every fifth row of the first
    is held out.
    Rows in both are refused: a held-out task must not be trained on. name: how errors call it.
    """

    def __init__(
        self,
        factory: Callable[[], object],
        tasks: Path | Sequence[Mapping[str, object]],
        heldout_tasks: Path | Sequence[Mapping[str, object]] | None = None,
        *,
        max_observation_chars: int = 16_000,
        name: str = "",
    ) -> None:
        self.name = str(getattr(factory, "__name__", type(factory).__name__))
        self._factory, self._limit = factory, max_observation_chars
        self._code = ForeignCode(name or self.name)
        self._first: object = None
        self._first = instance = self._make()
        if get_method(instance, "reset", self.name) is None:
            raise UserError(f"{self.name} has no method reset(**row)")
        judging = [get_method(instance, method, self.name) for method in ("get_verdict", "get_reward")]
        if not any(judging):
            raise UserError(f"{self.name} has neither get_verdict() nor get_reward(): nothing can be judged")
        for method in ("reset", "get_verdict", "get_reward"):
            refuse_generator(get_method(instance, method, self.name), f"{self.name}.{method}")
        tools_of(instance)  # its errors now, not in the middle of a run
        self._rows = RowTasks(tasks, heldout_tasks)

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; a task repeats only once all have been drawn."""
        return self._rows.sample(split, count, seed)

    def reset(self, task: Task) -> CustomEpisode:
        if not isinstance(task.payload, Row):
            raise TypeError(f"task {task.task_id!r} is not one of this environment's")
        instance = self._make()
        return CustomEpisode(self._code, instance, tools_of(instance), task.payload, self._limit)

    def attacks(self, split: str) -> Sequence[str]:
        """None of its own: a user's attacks come from a file, or from a model."""
        return ()

    def goal(self, task: Task) -> str:
        """The column `injection` of an injected task. UserError where it has none."""
        row = cast(Row, task.payload)
        goal = row.columns.get("injection")
        if not isinstance(goal, str) or not goal.strip():
            raise UserError(
                f"task {task.task_id} is injected, but has no column injection with what the attacker wants; "
                "reset(injection=...) is given it in the words of the attack"
            )
        return goal

    def attacked(self, task: Task, attack: Attack) -> Task:
        """The row with `injection` in the words of the attack, which `reset` puts where a tool shows it."""
        row = cast(Row, task.payload)
        columns = {**row.columns, "injection": attack.text(self.goal(task))}
        return replace(task, payload=replace(row, columns=columns))

    def _make(self) -> object:
        made = self._code.demand(f"{self.name}()", self._factory)
        if made is None or made is self._first:
            raise UserError(
                f"{self.name}() gave {'None' if made is None else 'an instance that it has given before'}; "
                "every rollout needs an instance of its own"
            )
        return made


def load_environment(
    spec: str, tasks: str | None, heldout_tasks: str | None, *, max_observation_chars: int
) -> Environment:
    """The environment that `module:Class` names; the working directory is searched first.

    UserError where there is no such module or class, where the class is not of the documented shape, or
    where the tasks cannot be read.
    """
    factory = import_named(spec, "env.name")
    if all(get_member(factory, method, f"env.name {spec!r}") for method in ("sample", "reset")):
        made = call_named(spec, "env.name", factory)
        return WholeEnvironment(made, f"env.name {spec!r}", max_observation_chars=max_observation_chars)
    library = sys.modules.get("verifiers")
    if library is not None and inspect.isfunction(factory):
        from mosaic_rollout.environments.verifiers import VerifiersEnvironment

        made = call_named(spec, "env.name", factory)
        if isinstance(made, library.Environment):
            return VerifiersEnvironment(made, spec, max_observation_chars=max_observation_chars)
    if tasks is None:
        raise UserError(f"env.name {spec!r} needs env.tasks, a JSON Lines file with one task a line")
    held = None if heldout_tasks is None else Path(heldout_tasks)
    return CustomEnvironment(
        factory, Path(tasks), held, max_observation_chars=max_observation_chars, name=f"env.name {spec!r}"
    )


def _name(instance: object) -> str:
    return type(instance).__qualname__
