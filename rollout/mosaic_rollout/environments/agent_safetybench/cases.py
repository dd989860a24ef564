"""Agent-SafetyBench's cases: the file `released_data.json`, which the user brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mosaic_rollout.environments.agent_safetybench.worlds import has_world
from mosaic_rollout.environments.splits import text_key
from mosaic_rollout.environments.user_data import read_json_list, text_at
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, Message, Task


@dataclass(frozen=True)
class WorldSpec:
    """An environment of a case: its name, the tools of it that the case offers, its opening state."""

    name: str
    tools: tuple[str, ...]
    parameters: Mapping[str, JsonValue] | None


@dataclass(frozen=True)
class Case:
    """One of the 2,000 cases."""

    case_id: str
    messages: tuple[Message, ...]
    worlds: tuple[WorldSpec, ...]
    fulfillable: bool  # whether there is a safe way to do what is asked

    @property
    def leak_key(self) -> str:
        return text_key(" ".join(str(message["content"]) for message in self.messages))


def read_cases(path: Path) -> list[Case]:
    """All cases of a file. UserError names the file, the case and what is wrong with it."""
    found = read_json_list(path, "Agent-SafetyBench's released_data.json")
    return [_case(path, index, entry) for index, entry in enumerate(found)]


def case_of(task: Task) -> Case:
    """What a task is made of. Raises TypeError for a task of another environment."""
    if not isinstance(task.payload, Case):
        raise TypeError(f"{task.task_id} is not an Agent-SafetyBench task")
    return task.payload


def _case(path: Path, index: int, entry: object) -> Case:
    if not isinstance(entry, dict):
        raise UserError(f"{path}, case {index}: not an object")
    case_id = str(entry.get("id", index))
    where = f"{path}, case {case_id}"
    fulfillable = entry.get("fulfillable")
    if fulfillable not in (0, 1):
        raise UserError(f'{where}: "fulfillable" must be 0 or 1, it is {fulfillable!r:.40}')
    worlds = entry.get("environments")
    if not isinstance(worlds, list):
        raise UserError(f'{where}: "environments" must be a list, of objects with name, tools and parameters')
    named = [world for world in worlds if isinstance(world, dict) and world.get("name")]
    specs = tuple(_world(where, world) for world in named)
    return Case(case_id, _messages(where, entry), specs, fulfillable == 1)


def _world(where: str, world: Mapping[str, object]) -> WorldSpec:
    name, tools, parameters = str(world["name"]), world.get("tools"), world.get("parameters")
    if not has_world(name):
        raise UserError(f"{where}: agent-safety-bench-envs has no environment {name!r}")
    if not isinstance(tools, list) or not all(isinstance(tool, str) for tool in tools):
        raise UserError(f'{where}: "tools" of {name} must be a list of names')
    if parameters is not None and not isinstance(parameters, dict):
        raise UserError(f'{where}: "parameters" of {name} must be an object or null')
    return WorldSpec(name, tuple(tools), cast("Mapping[str, JsonValue] | None", parameters))


def _messages(where: str, entry: Mapping[str, object]) -> tuple[Message, ...]:
    """The dialogue that a case opens with, if it has one, else its instruction."""
    dialogue = entry.get("dialog")
    if isinstance(dialogue, list) and dialogue:
        fits = all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in dialogue)
        if fits and dialogue[-1]["role"] == "user":
            return tuple({"role": m["role"], "content": m["content"]} for m in dialogue)
        raise UserError(f'{where}: "dialog" must be messages with role and content that end with the user\'s')
    return ({"role": "user", "content": text_at(entry, "instruction", where)},)
