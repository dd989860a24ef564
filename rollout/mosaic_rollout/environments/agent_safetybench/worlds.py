"""The one door to the installed `agent-safety-bench-envs`: 2,046 small tool environments."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Protocol, cast

from mosaic_rollout.environments.packages import EnvironmentMissing, require_package
from mosaic_rollout.types import JsonValue

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
