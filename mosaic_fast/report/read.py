"""A run folder read back, whatever state the run left it in: what cannot be read is noted, never fatal."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from pydantic import JsonValue, ValidationError

from mosaic_fast.errors import UserError
from mosaic_fast.run.trajectories import RolloutRow

OUTCOMES = "outcomes.jsonl"
"""The episodes of an evaluation, in the folder of its --out."""
_NOTE_SHOWN = 500  # characters of what a run said of a step
_EARLIER_NAMES = {
    "tree/plan_held": "tree/plan_kept",
    "tree/predicted_held_s": "tree/predicted_kept_s",
    "tree/held": "tree/kept_prefixes",
    "tree/held_recomputed": "tree/kept_recomputed",
}
"""Metrics of runs of earlier versions -> what they are called now."""
_UNREAD = {"split", "prompt_tokens", "cached_tokens", "rollout_logprobs"}
"""Fields of a trajectory that no reader here needs: damage to them costs no row, and they take no memory."""
_NOTES_SHOWN = 20  # a folder full of broken lines is described by its first ones and their number


class Notes:
    """What was missing or broken in a run folder, in the order it was met."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._count = 0

    def add(self, note: str) -> None:
        self._count += 1
        if len(self._shown) < _NOTES_SHOWN:
            self._shown.append(note)

    @property
    def texts(self) -> list[str]:
        hidden = self._count - len(self._shown)
        return self._shown + ([f"and {hidden} more of the kind"] if hidden else [])


def require_run_folder(folder: Path) -> None:
    """UserError unless `folder` is one that training wrote, however little of it."""
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    names = ("metrics.jsonl", "trajectories", "config.toml", OUTCOMES)
    if not any((folder / name).exists() for name in names):
        raise UserError(
            f"{folder} is not a run folder: it has no metrics.jsonl, trajectories/ or config.toml; "
            "name the folder that training printed, for example runs/<time>-world"
        )


def read_config(folder: Path, notes: Notes) -> dict[str, JsonValue]:
    """config.toml, flat: {"loss.kl_weight": 0.01, ...}."""
    try:
        return _flatten(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")))
    except FileNotFoundError:
        notes.add("config.toml is missing")
    except (OSError, ValueError, RecursionError) as error:  # a TOMLDecodeError is a ValueError
        notes.add(f"config.toml cannot be read: {error}")
    return {}


def read_summary(folder: Path, notes: Notes) -> dict[str, JsonValue]:
    """summary.json; a run writes it as it ends."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.add("there is no summary.json: the run is still going or was killed")
    except (OSError, ValueError, RecursionError) as error:
        notes.add(f"summary.json cannot be read: {error}")
    else:
        if isinstance(summary, dict):
            if not summary.get("complete", True):
                notes.add("the run was stopped before its last step")
            return summary
        notes.add("summary.json is not a JSON object")
    return {}


def read_metrics(folder: Path, notes: Notes) -> dict[str, list[float | None]]:
    """metrics.jsonl by column, `step` first and rising; None where a row lacks a metric."""
    rows: dict[float, dict[str, float]] = {}
    for number, line in _lines(folder / "metrics.jsonl", notes):
        try:
            row = json.loads(line)
            named = {_EARLIER_NAMES.get(name, name): value for name, value in row.items()}
            values = {str(k): float(v) for k, v in named.items() if isinstance(v, int | float)}
            rows[values["step"]] = {k: v for k, v in values.items() if math.isfinite(v)}
        except (ValueError, KeyError, AttributeError, OverflowError, RecursionError):
            notes.add(f"metrics.jsonl, line {number} is incomplete and left out")
    names = dict.fromkeys(["step"] + [name for row in rows.values() for name in row])
    return {name: [rows[step].get(name) for step in sorted(rows)] for name in names} if rows else {}


def read_step_notes(folder: Path, notes: Notes) -> None:
    """What the run said of its steps, from notes.jsonl; a run that had nothing to say has none."""
    if not (folder / "notes.jsonl").exists():
        return
    for number, line in _lines(folder / "notes.jsonl", notes):
        try:
            row = json.loads(line)
            notes.add(f"step {int(row['step'])}: {str(row['note'])[:_NOTE_SHOWN]}")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            notes.add(f"notes.jsonl, line {number} is incomplete and left out")


def trajectory_files(folder: Path) -> list[tuple[int, Path]]:
    """(training step, file) of every complete trajectory file, by step."""
    found = []
    for path in (folder / "trajectories").glob("step-*.jsonl"):
        number = path.stem.removeprefix("step-")
        if number.isdecimal():
            found.append((int(number), path))
    return sorted(found)


def read_groups(path: Path, notes: Notes) -> Iterator[list[RolloutRow]]:
    """The groups of one trajectory file, one at a time."""

    def rows() -> Iterator[RolloutRow]:
        for number, line in _lines(path, notes):
            try:
                row = json.loads(line)
                shown = {k: v for k, v in row.items() if k not in _UNREAD} if isinstance(row, dict) else row
                yield RolloutRow.model_validate(shown)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                notes.add(f"{path.name}, line {number} is left out: {where}: {first['msg']}")
            except (ValueError, RecursionError):
                notes.add(f"{path.name}, line {number} is incomplete and left out")

    for _, members in groupby(rows(), key=lambda row: row.group_id):
        yield list(members)


def read_episodes(path: Path, notes: Notes) -> Iterator[list[RolloutRow]]:
    """The episodes of an evaluation's outcomes.jsonl, a group a task: its samples, or the attacks on it.

    Text alone: an evaluation keeps no tokens, so there is no prefix tree, and nothing was judged.
    """
    tasks: dict[tuple[str, int], list[RolloutRow]] = {}
    for number, line in _lines(path, notes):
        try:
            row = json.loads(line)
            outcome = row["outcome"]
            attack = row.get("attack") or {}
            shown = {name: outcome[name] for name in ("kind", "status", "harm", "done", "details")}
            course = {name: row[name] for name in ("messages", "tools") if name in row}
            steps = [{**step, "span": (0, 0)} for step in row["steps"]]
            own = {"task_id": row["task_id"], "group_id": row["index"], "rollout_id": number - 1}
            told = {"attack": attack.get("name"), "steps": steps}
            members = tasks.setdefault((row["suite"], row["index"]), [])
            members.append(RolloutRow.model_validate({**shown, **course, **own, **told}))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            notes.add(f"{path.name}, line {number} is incomplete and left out")
    yield from tasks.values()


def decided(group: Sequence[RolloutRow]) -> list[list[float]] | None:
    """The preference matrix of a group; None where a member is missing or the judge left none."""
    matrix = [row.preferences for row in group]
    return matrix if all(len(row) == len(group) for row in matrix) else None


def _lines(path: Path, notes: Notes) -> Iterator[tuple[int, str]]:
    """The non-empty lines of a file with their numbers; bytes that are no UTF-8 show as U+FFFD."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        notes.add(f"{path.name} is missing")
    except OSError as error:
        notes.add(f"{path.name} cannot be read: {error.strerror or error}")


def _flatten(values: dict[str, JsonValue], prefix: str = "") -> dict[str, JsonValue]:
    flat: dict[str, JsonValue] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
