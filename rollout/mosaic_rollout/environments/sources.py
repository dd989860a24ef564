"""What benchmarks come from: installed packages in the one known version, and files that a user brings.

Either is named where it is missing or does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task

Payload = TypeVar("Payload")


class EnvironmentMissing(UserError):
    """A benchmark's package is not installed, or not in the version its adapter was written for."""


def require_package(name: str, known_version: str, install_hint: str) -> None:
    """Raise EnvironmentMissing unless the package is installed in exactly `known_version`.

    install_hint: what the user runs to have it, in the imperative.
    """
    try:
        installed = version(name)
    except PackageNotFoundError:
        raise EnvironmentMissing(f"the package {name} is not installed; {install_hint}") from None
    if installed != known_version:
        raise EnvironmentMissing(
            f"{name} {installed} is installed, but its insides are used and only {known_version} is known to "
            f"fit; {install_hint}"
        )


def read_json_file(path: Path) -> object:
    """What a JSON file holds, after a byte order mark or none. UserError where it cannot be read as such."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_json_list(path: Path, what: str) -> list[object]:
    """The entries of a JSON file that is one list. UserError says `what` it must be where it is none."""
    found = read_json_file(path)
    if not isinstance(found, list) or not found:
        raise UserError(f"{path} holds no list of cases; it must be {what}")
    return found


def text_at(entry: Mapping[str, object], key: str, where: str) -> str:
    """A text that an entry must have. UserError says where it is missing or empty."""
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f'{where}: there is no "{key}"')
    return value


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def payload_of(task: Task, kind: type[Payload], environment: str) -> Payload:
    """What an environment's task is made of. TypeError for a task of another environment."""
    if not isinstance(task.payload, kind):
        raise TypeError(f"{task.task_id} is not a task of {environment}")
    return task.payload
