"""Agent-SafetyBench as an environment: the suite that MOSAIC is reported to be trained on.

Agent-SafetyBench (Zhang et al., arXiv 2412.14470). The 2,046 small tool environments come from the package
`agent-safety-bench-envs==0.1.0` (Apache-2.0), the cases from the user's copy of `released_data.json`. Nothing
of the benchmark is stored in this repository.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

from mosaic_rollout.environments.guarded import UNJUDGED, GuardedEpisode, as_text
from mosaic_rollout.environments.sources import (
    EnvironmentMissing,
    divide,
    draw,
    payload_as,
    read_json_list,
    require_package,
    text_at,
    text_key,
)
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.code import words
from mosaic_rollout.types import JsonValue, Message, Observation, Task, ToolCall, ToolSchema, Verdict


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
    return payload_as(task, Case, "Agent-SafetyBench")


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


WORLDS_VERSION = "0.1.0"
INSTALL_HINT = f"run `make agent-safetybench`, or `pip install agent-safety-bench-envs=={WORLDS_VERSION}`"
_FILE_ARGUMENTS = ("local_file_path",)
"""Arguments with which a tool writes to this machine's disk: it is given a file that takes anything."""


class World(Protocol):
    """asb_envs.base.BaseEnv."""

    def get_tool_descs(self, tool_names: Sequence[str]) -> list[dict[str, JsonValue]]: ...
    def call_tool(self, tool_name: str, arguments: dict[str, JsonValue]) -> object: ...


@cache
def check_installed() -> None:
    """EnvironmentMissing where the package, in its known version, is not there."""
    require_package("agent-safety-bench-envs", WORLDS_VERSION, INSTALL_HINT)
    if find_spec("asb_envs") is None:
        raise EnvironmentMissing(f"agent-safety-bench-envs cannot be imported; {INSTALL_HINT}")


@cache
def has_world(name: str) -> bool:
    """Whether the package has an environment of this name. EnvironmentMissing where there is no package."""
    if not name.isidentifier():
        return False
    check_installed()
    return find_spec(f"asb_envs.envs.{name}") is not None


def make_world(name: str, parameters: Mapping[str, JsonValue] | None) -> World:
    """A fresh environment in the state that a case's parameters describe. It may raise anything."""
    world = getattr(importlib.import_module(f"asb_envs.envs.{name}"), name)
    return cast(World, world(parameters=copy.deepcopy(dict(parameters or {}))))  # many cannot take None


def call_world(world: World, name: str, arguments: Mapping[str, JsonValue]) -> object:
    """Run a tool. It may raise anything, and never writes a file."""
    own = copy.deepcopy(dict(arguments))  # call_tool edits what it is given
    return world.call_tool(name, {key: os.devnull if key in _FILE_ARGUMENTS else own[key] for key in own})


_CODE = ForeignCode("Agent-SafetyBench", of_user=False)


class AgentSafetyBenchEpisode(GuardedEpisode):
    """Messages and tools as OpenAI has them; fresh environments in the case's opening state."""

    checks_arguments = False  # the package does, and converts them to the types of its schema

    def __init__(self, case: Case, max_observation_chars: int) -> None:
        super().__init__(_CODE, max_observation_chars)
        self.messages = copy.deepcopy(case.messages)
        self._worlds: dict[str, World] = {}  # by the name of each tool; of two the first, as upstream
        tools: list[ToolSchema] = []
        for spec in case.worlds:
            world, described = _open(case, spec)
            for name, schema in described.items():
                if name not in self._worlds:
                    self._worlds[name] = world
                    tools.append(schema)
        self.tools = tools

    def _carry_out(self, call: ToolCall) -> Observation:
        """Run one tool."""
        world = self._worlds.get(call.name)
        if world is None:
            return self._error(f"no tool is named {call.name!r}")
        return Observation(as_text(call_world(world, call.name, call.arguments)))

    def _judge(self, final_answer: str | None) -> Verdict:
        """No verdict: the benchmark has no checker of its own, harm is for a model to judge."""
        return UNJUDGED


def _open(case: Case, spec: WorldSpec) -> tuple[World, dict[str, ToolSchema]]:
    """An environment and the schemas of the tools that the case offers. UserError where they do not fit."""
    try:
        world = make_world(spec.name, spec.parameters)
        described = copy.deepcopy(world.get_tool_descs(spec.tools))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(
            f"case {case.case_id}: {spec.name} does not take the case's parameters or tools ({words(error)})"
        ) from error
    return world, {str(tool["name"]): {"type": "function", "function": tool} for tool in described}


class AgentSafetyBenchEnvironment:
    """The cases of a file; one that cannot be fulfilled safely is a harmful task, any other a benign one.

    tasks: released_data.json. heldout_tasks: another file of the same form to hold out; without it,
    `heldout_frac` of the requests of the first. max_observation_chars: longer tool outputs are cut.

    Raises EnvironmentMissing where the package is not installed, UserError for a file that does not fit.
    """

    name = "agent_safetybench"

    def __init__(
        self,
        tasks: Path,
        heldout_tasks: Path | None = None,
        *,
        heldout_frac: float = 0.2,
        max_observation_chars: int = 16_000,
    ) -> None:
        check_installed()
        held = None if heldout_tasks is None else read_cases(heldout_tasks)
        cases = divide(read_cases(tasks), held, lambda case: case.leak_key, heldout_frac)
        self._pools = {split: [_task(case, split) for case in members] for split, members in cases.items()}
        self._limit = max_observation_chars

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; repeats only once all have been drawn."""
        return draw(self._pools, split, count, seed)

    def reset(self, task: Task) -> AgentSafetyBenchEpisode:
        """A fresh episode. UserError where the case's parameters or tools are not its environments'."""
        return AgentSafetyBenchEpisode(case_of(task), self._limit)


def _task(case: Case, split: str) -> Task:
    return Task(case.case_id, "benign" if case.fulfillable else "harmful", split, case)
