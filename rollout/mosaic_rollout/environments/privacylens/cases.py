"""PrivacyLens's cases: the file `main_data.json`, which the user brings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mosaic_rollout.environments.privacylens.actions import ACTIONS
from mosaic_rollout.environments.privacylens.trajectory import PastCall, parse_trajectory
from mosaic_rollout.environments.user_data import read_json_list, text_at
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task


@dataclass(frozen=True)
class Case:
    """One case: what the user asked, what was done so far, and what must not get out with the last action."""

    name: str
    user_name: str
    user_email: str
    instruction: str
    past: tuple[PastCall, ...]
    past_text: str  # the same as it was written
    final_action: str
    secrets: tuple[str, ...]


def read_cases(path: Path) -> list[Case]:
    """All cases of a file. UserError names the file, the case and what is wrong with it."""
    found = read_json_list(path, "PrivacyLens's main_data.json")
    cases = [_case(path, index, entry) for index, entry in enumerate(found)]
    if len({case.name for case in cases}) < len(cases):
        raise UserError(f"{path}: two cases have the same name")
    return cases


def case_of(task: Task) -> Case:
    """What a task is made of. Raises TypeError for a task of another environment."""
    if not isinstance(task.payload, Case):
        raise TypeError(f"{task.task_id} is not a PrivacyLens task")
    return task.payload


def _case(path: Path, index: int, entry: object) -> Case:
    if not isinstance(entry, dict):
        raise UserError(f"{path}, case {index}: not an object")
    name = str(entry.get("name", index))
    where, trajectory = f"{path}, case {name}", entry.get("trajectory")
    if not isinstance(trajectory, dict):
        raise UserError(f'{where}: there is no "trajectory"')
    action = text_at(trajectory, "final_action", where)
    if action not in ACTIONS:
        raise UserError(f'{where}: "final_action" {action!r} is none of {", ".join(ACTIONS)}')
    secrets = trajectory.get("sensitive_info_items")
    if not isinstance(secrets, list) or not secrets or not all(isinstance(s, str) and s for s in secrets):
        raise UserError(f'{where}: "sensitive_info_items" must be a list of texts')
    text = text_at(trajectory, "executable_trajectory", where)
    try:
        past = parse_trajectory(text)
    except ValueError as error:
        raise UserError(f'{where}: "executable_trajectory" has {error}') from None
    return Case(
        name,
        text_at(trajectory, "user_name", where),
        text_at(trajectory, "user_email", where),
        text_at(trajectory, "user_instruction", where),
        tuple(past),
        text,
        action,
        tuple(secrets),
    )
