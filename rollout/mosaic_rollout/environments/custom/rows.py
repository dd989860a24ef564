"""Tasks of a user's environment: a JSON Lines file, one object a row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from mosaic_rollout.errors import UserError
from mosaic_rollout.plain_json import read_json
from mosaic_rollout.types import JsonValue, Message, TaskKind


@dataclass(frozen=True)
class Row:
    """One task: `prompt` and `kind` are read here, everything else goes to the user's `reset`."""

    row_id: str
    messages: tuple[Message, ...]
    kind: TaskKind
    columns: dict[str, JsonValue]


def read_rows(path: Path) -> list[Row]:
    """All rows. UserError names the file, the line and what is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tasks of {path}: {error}") from None
    rows = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"{path} has no tasks; write one JSON object a line, with at least a prompt")
    return rows


def _row(path: Path, number: int, line: str) -> Row:
    where = f"{path}, line {number}"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(found, dict) or "prompt" not in found:
        raise UserError(f'{where}: a task is an object with a "prompt", for example {{"prompt": "Book it"}}')
    kind = found.get("kind", "benign")
    if kind not in get_args(TaskKind):
        raise UserError(f'{where}: "kind" is {kind!r}; it must be one of {", ".join(get_args(TaskKind))}')
    columns = {name: value for name, value in found.items() if name not in ("prompt", "kind")}
    return Row(f"{path.stem}-{number}", _messages(where, found["prompt"]), cast(TaskKind, kind), columns)


def _messages(where: str, prompt: object) -> tuple[Message, ...]:
    """A prompt is the user's text, or OpenAI messages that end with one."""
    if isinstance(prompt, str) and prompt:
        return ({"role": "user", "content": prompt},)
    if isinstance(prompt, list) and prompt:
        fits = all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in prompt
        )
        if fits and prompt[-1]["role"] == "user":
            if not all(_calls_fit(message.get("tool_calls")) for message in prompt):
                raise UserError(
                    f'{where}: "tool_calls" must be a list of {{"function": {{"name", "arguments"}}}}, with '
                    "arguments as an object or its JSON"
                )
            return tuple(prompt)
    raise UserError(
        f'{where}: "prompt" must be a text, or a list of {{"role", "content"}} messages that ends with '
        "the user's"
    )


def _calls_fit(calls: object) -> bool:
    """Whether the calls of a message, if any, are those of OpenAI's format."""
    if calls is None:
        return True
    return isinstance(calls, list) and all(
        isinstance(call, dict) and _function_fits(call.get("function")) for call in calls
    )


def _function_fits(function: object) -> bool:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    try:
        return isinstance(read_json(arguments) if isinstance(arguments, str) else arguments, dict)
    except ValueError:
        return False
