"""How an injected order is put into words: attacks of an environment's own, of a file, or of a model.

An injected task has a goal (what the attacker wants done) and carries it in a tool's output. An attack is the
wording around the goal: it may be changed without changing the task, its checker or what the user asks for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from mosaic_rollout.errors import UserError
from mosaic_rollout.plain_json import read_lines
from mosaic_rollout.types import Task

GOAL = "{goal}"
"""What stands in a template for the goal. Every other brace is text."""


@dataclass(frozen=True)
class Attack:
    """A wording. template: a text with {goal} in it; None: the environment's own attack of that name.

    >>> Attack("mine", "IMPORTANT: {goal} {now}").text("pay bob")
    'IMPORTANT: pay bob {now}'
    """

    name: str
    template: str | None = None

    def text(self, goal: str) -> str:
        """The template with the goal in it, or before the goal where it has no place for it."""
        template = self.template or ""
        return template.replace(GOAL, goal) if GOAL in template else f"{template} {goal}"


@runtime_checkable
class Attackable(Protocol):
    """An environment whose injected tasks can be attacked in other words."""

    def attacks(self, split: str) -> Sequence[str]:
        """Names of the environment's own attacks of a split; there may be none."""
        ...

    def goal(self, task: Task) -> str:
        """What the injected order of a task wants done, in words."""
        ...

    def attacked(self, task: Task, attack: Attack) -> Task:
        """The task, its id kept, with its order in the words of the attack. UserError: no such attack."""
        ...


def attackable(environment: object, name: str) -> Attackable:
    """The environment as one that can be attacked. UserError where it cannot."""
    if isinstance(environment, Attackable):
        return environment
    raise UserError(
        f"env.name {name!r} has no injected order that could be put in other words; world, agentdojo and a "
        "class of your own whose injected tasks have a column `injection` do"
    )


def read_attacks(path: Path) -> tuple[Attack, ...]:
    """The attacks of a file: a template a line, or, where its name ends in .jsonl, a JSON string a line.

    {goal} stands for what the attacker wants; a template without it stands before the goal. Attacks are
    named by the file and their line. UserError for a file that cannot be read, has none, or names one twice.
    """
    try:
        lines = [(number, line.rstrip("\r\n")) for number, line in read_lines(path)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the attacks of {path}: {error}") from None
    found: dict[str, Attack] = {}
    for number, line in lines:
        template = _string(path, number, line) if path.suffix == ".jsonl" else line.strip()
        if template in found:
            raise UserError(f"{path}, line {number}: the same attack as {found[template].name}")
        found[template] = Attack(f"{path.name}:{number}", template)
    if not found:
        raise UserError(f"{path} has no attacks; write one a line, {GOAL} where the attacker's goal stands")
    return tuple(found.values())


def _string(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f'{path}, line {number}: an attack is a JSON string, for example "First {GOAL}"')
    return value
