"""A user's class with `sample` and `reset(task)`, used as a whole environment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import cast, get_args

from mosaic_rollout.environments.custom.moves import shown_moves
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.checks import shown
from mosaic_rollout.foreign.code import BrokenContract, get_member, get_method
from mosaic_rollout.types import (
    Episode,
    JsonValue,
    Moves,
    Observation,
    Task,
    TaskKind,
    ToolCall,
    Verdict,
)


class WholeEpisode(GuardedEpisode):
    """The user's episode. Its messages and tools are copied as it shows them."""

    def __init__(
        self, code: ForeignCode, inner: object, max_observation_chars: int, show: Callable[[], Moves]
    ) -> None:
        """show: gives the turns of a demonstration of the episode's task."""
        super().__init__(code, max_observation_chars)
        self.demonstrate = show
        self._inner, self._what = cast(Episode, inner), f"{code.name}: {type(inner).__qualname__}"
        for method in ("step", "score"):
            if get_method(inner, method, self._what) is None:
                raise UserError(f"{self._what} has no method {method}; see Episode in mosaic_rollout.types")
        self.messages = tuple(self._dicts("messages", "role"))
        self.tools = self._dicts("tools", "function")

    def _carry_out(self, call: ToolCall) -> Observation:
        found = self._code.run(self._inner.step, call)
        if not isinstance(found, Observation):
            raise BrokenContract(f"{self._what}.step must return an Observation, not {shown(found)}")
        self.tools = self._dicts("tools", "function")
        return Observation(str(found.content), bool(found.is_error))

    def _judge(self, final_answer: str | None) -> Verdict:
        return cast(Verdict, self._code.demand(f"{self._what}.score", self._inner.score, final_answer))

    def _dicts(self, name: str, key: str) -> list[dict[str, JsonValue]]:
        """What the user's episode shows, as a list of objects that have `key`; a copy."""
        found = get_member(self._inner, name, self._what)
        listed = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]
        if not all(isinstance(one, Mapping) and _holds(one.get(key)) for one in listed):
            raise BrokenContract(
                f'{self._what}.{name} must be a list of objects with "{key}", not {shown(found)}'
            )
        copied = self._code.demand(f"{self._what}.{name}", copy.deepcopy, listed)
        return cast("list[dict[str, JsonValue]]", copied)


class WholeDialogue(WholeEpisode):
    """The user's episode, whose user goes on after an answer."""

    def next_user_message(self, final_answer: str) -> str | None:
        """What the user says then, None where there is nothing more."""
        what = f"{self._what}.next_user_message"
        with self._alone("the user's next message"):
            method = get_method(self._inner, "next_user_message", self._what)
            found = None if method is None else self._code.demand(what, method, final_answer)
            self.tools = self._dicts("tools", "function")
        if found is not None and not isinstance(found, str):
            raise UserError(f"{what} must return a text or None, not {shown(found)}")
        return found


class WholeEnvironment:
    """The user's environment. What it raises is a UserError with its file and line."""

    def __init__(self, inner: object, name: str, *, max_observation_chars: int) -> None:
        self._inner, self._code, self._limit = inner, ForeignCode(name), max_observation_chars
        self.name = str(get_member(inner, "name", name) or type(inner).__name__)

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """The user's tasks. UserError where they are not `count` tasks."""
        found = self._demand("sample", split, count, seed)
        tasks = list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]
        for task in tasks:
            if not isinstance(task, Task) or task.kind not in get_args(TaskKind):
                raise UserError(
                    f"{self._code.name}: sample must return a list of Task, each with a kind among "
                    f"{', '.join(get_args(TaskKind))}; there is {shown(task)}"
                )
        if len(tasks) != count:
            raise UserError(f"{self._code.name}: sample gave {len(tasks)} tasks where {count} were asked for")
        return cast("list[Task]", tasks)

    def reset(self, task: Task) -> WholeEpisode:
        """A fresh episode, of a copy of the task, so that no episode can change it for the next."""
        inner = self._demand("reset", _copy(task))
        kind = WholeEpisode
        if get_method(inner, "next_user_message", self._code.name) is not None:
            kind = WholeDialogue
        return kind(self._code, inner, self._limit, lambda: self._shown(task))

    def _shown(self, task: Task) -> Moves:
        found = get_method(self._inner, "demonstrate", self._code.name)
        if found is None:
            raise UserError(f"{self._code.name} has no method demonstrate(task), so it shows no turns")
        return shown_moves(self._code, f"{self._code.name}: demonstrate", found, _copy(task))

    def _demand(self, method: str, *arguments: object) -> object:
        found = get_method(self._inner, method, self._code.name)
        if found is None:
            raise UserError(f"{self._code.name} has no method {method}")
        return self._code.demand(f"{self._code.name}: {method}", found, *arguments)


def _copy(task: Task) -> Task:
    """A task with a payload of its own; one that cannot be copied, for example an open file, is shared."""
    try:
        return copy.deepcopy(task)
    except Exception:  # noqa: BLE001  __deepcopy__ of a payload may raise anything
        return task


def _holds(value: object) -> bool:
    """Whether it is a message's role, or a tool's function with a name."""
    return isinstance(value.get("name") if isinstance(value, Mapping) else value, str)
