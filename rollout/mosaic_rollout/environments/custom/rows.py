"""Tasks of a user's environment: a JSON Lines file, one object a row."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from mosaic_rollout.chat.messages import ROLES
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign.checks import shown
from mosaic_rollout.plain_json import read_json, read_lines
from mosaic_rollout.types import JsonValue, Message, Task, TaskKind


@dataclass(frozen=True)
class Row:
    """One task: `prompt` and `kind` are read here, everything else goes to the user's `reset`."""

    row_id: str
    messages: tuple[Message, ...]
    kind: TaskKind
    columns: dict[str, JsonValue]


def read_rows(tasks: Path | Sequence[Mapping[str, object]], given: str = "tasks") -> list[Row]:
    """All rows of a file, or given as such. UserError names the file, the line and what is wrong with it.

    given: how errors and task ids call rows that are in no file.
    """
    path = tasks if isinstance(tasks, Path) else Path(given)
    try:
        if not isinstance(tasks, Path):
            return [_row(path, number, _as_line(path, number, row)) for number, row in enumerate(tasks, 1)]
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tasks of {path}: {error}") from None
    rows = [_row(path, number, line) for number, line in lines]
    if not rows:
        raise UserError(f"{path} has no tasks; write one JSON object a line, with at least a prompt")
    return rows


class RowTasks:
    """Rows as tasks, some of them held out: those of a second file, or else every fifth.

    UserError where a row is on both sides, or where one row is all there is.
    """

    def __init__(
        self,
        tasks: Path | Sequence[Mapping[str, object]],
        heldout_tasks: Path | Sequence[Mapping[str, object]] | None,
    ) -> None:
        rows = read_rows(tasks)
        if heldout_tasks is None:
            if len(rows) < 2:
                raise UserError(
                    f"{rows_name(tasks)} has one task; at least two are needed, one of them to hold out"
                )
            held = rows[4::5] or rows[-1:]
            names = {row.row_id for row in held}
            train = [row for row in rows if row.row_id not in names]
        else:
            train, held = rows, read_rows(heldout_tasks, "heldout")
        seen = {_content(row) for row in train}
        for row in held:
            if _content(row) in seen:
                raise UserError(
                    f"task {row.row_id} is held out and trained on: {row.messages[-1]['content']!r:.60}"
                )
        self._rows = {"train": train, "heldout": held}

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        """`count` tasks, a pure function of its arguments; a task repeats only once all have been drawn."""
        if split not in self._rows:
            raise ValueError(f"unknown split {split!r}; the splits are {', '.join(self._rows)}")
        rows, drawn = self._rows[split], list[Row]()
        rng = random.Random(f"{split}|{seed}")
        while len(drawn) < count:
            drawn += rng.sample(rows, min(len(rows), count - len(drawn)))
        return [Task(row.row_id, row.kind, split, row) for row in drawn]


def _content(row: Row) -> str:
    return repr((row.messages, sorted(row.columns.items(), key=lambda item: item[0])))


def rows_name(tasks: Path | Sequence[Mapping[str, object]]) -> str:
    """How errors call tasks as a whole."""
    return str(tasks) if isinstance(tasks, Path) else "tasks"


def _as_line(path: Path, number: int, row: Mapping[str, object]) -> str:
    """A row that was given as a mapping, as the line of a file that it would be."""
    try:
        return json.dumps(row, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: a row must hold plain JSON values ({error})") from None


def _row(path: Path, number: int, line: str) -> Row:
    where = f"{path}, line {number}"
    try:
        found = read_json(line, unique_keys=True)
    except ValueError as error:
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
        messages = [row_message(f"{where}, message {number}", one) for number, one in enumerate(prompt, 1)]
        if messages[-1]["role"] == "user":
            return tuple(messages)
    raise UserError(
        f'{where}: "prompt" must be a text, or a list of {{"role", "content"}} messages that ends with '
        "the user's"
    )


def row_message(where: str, found: JsonValue) -> Message:
    """A message with its content as text: OpenAI also has a list of parts, and none beside calls."""
    if not isinstance(found, Mapping) or not isinstance(found.get("role"), str):
        raise UserError(f'{where}: a message is an object with "role" and "content", not {shown(found)}')
    if found["role"] not in (*ROLES, "function"):
        raise UserError(f'{where}: "role" is {shown(found["role"])}; a conversation has {", ".join(ROLES)}')
    calls, content = found.get("tool_calls"), found.get("content")
    if not _calls_fit(calls):
        raise UserError(
            f'{where}: "tool_calls" must be a list of {{"function": {{"name", "arguments"}}}}, with '
            "arguments as an object or its JSON"
        )
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(where, part) for part in content)
    if not isinstance(content, str):
        raise UserError(
            f'{where}: "content" must be a text or a list of text parts, it is {shown(content)}; it may be '
            "left out beside tool_calls only"
        )
    return {**found, "content": content}


def _part(where: str, part: JsonValue) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise UserError(
            f'{where}: a part of "content" is of type {shown(kind)}; only {{"type": "text", "text"}} parts '
            "can be shown to the policy"
        )
    return text


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
