"""Files of data sets that a user brings: read, and named where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mosaic_rollout.errors import UserError


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
