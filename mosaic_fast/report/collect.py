"""A run folder -> what the page shows: a small index of everything, and bodies in compressed chunks."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue

from mosaic_fast.report.read import (
    OUTCOMES,
    Notes,
    decided,
    read_config,
    read_episodes,
    read_groups,
    read_metrics,
    read_step_notes,
    read_summary,
    require_run_folder,
    trajectory_files,
)
from mosaic_fast.report.tree import group_tree, token_parts
from mosaic_fast.run.trajectories import RolloutRow

_CHUNK_CHARS = 400_000  # of JSON; a browser unpacks one in a few milliseconds
_REQUEST_SHOWN = 160  # characters of the user's request in the list


class GroupEntry(NamedTuple):
    """A group in the index, and where its body is."""

    step: int
    task_id: str
    kind: str
    request: str
    chunk: int
    place: int  # in its chunk


class RolloutEntry(NamedTuple):
    """A rollout in the index: what filters and sorting look at."""

    group: int  # place in the index
    place: int  # in its group
    rollout_id: int
    status: str
    flags: int  # 1 harm, 2 done without harm, 4 a check, 8 forked, 16 tags misplaced
    reward: float | None
    advantage: float | None
    generated_tokens: int
    steps: int


@dataclass(frozen=True)
class RunData:
    """One run as the page holds it."""

    name: str
    config: dict[str, JsonValue]
    summary: dict[str, JsonValue]
    metrics: dict[str, list[float | None]]
    budget: list[list[float]]  # training step, then mean tokens of a rollout by part
    groups: list[GroupEntry]
    rollouts: list[RolloutEntry]
    notes: list[str]
    chunks: list[str]  # packed lists of group bodies

    @property
    def index(self) -> dict[str, object]:
        """All fields but `chunks`, the bodies of the groups."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "chunks"}


def collect_run(folder: Path, max_trajectories: int) -> RunData:
    """Read a run. Above `max_trajectories`, whole training steps are left out, evenly spread."""
    require_run_folder(folder)
    notes = Notes()
    if (folder / OUTCOMES).exists():
        return _collect_evaluation(folder, notes)
    config, summary = read_config(folder, notes), read_summary(folder, notes)
    metrics = read_metrics(folder, notes)
    read_step_notes(folder, notes)
    files = trajectory_files(folder)
    if not files:
        notes.add("there are no trajectories")
    kept = _thinned(files, max_trajectories)
    if len(kept) < len(files):
        notes.add(f"trajectories of {len(kept)} of {len(files)} training steps are shown, evenly spread")
    bodies = _Chunks()
    groups: list[GroupEntry] = []
    rollouts: list[RolloutEntry] = []
    budget: list[list[float]] = []
    for step, path in kept:
        parts: list[dict[str, int]] = []
        for group in read_groups(path, notes):
            chunk, place = bodies.add(_group_body(step, group, notes))
            first = group[0]
            groups.append(GroupEntry(step, first.task_id, first.kind, _request(first), chunk, place))
            rollouts.extend(_index_entry(len(groups) - 1, i, row) for i, row in enumerate(group))
            parts.extend(token_parts(row) for row in group)
        if parts:
            budget.append([step, *(sum(part[name] for part in parts) / len(parts) for name in parts[0])])
    return RunData(
        name=folder.resolve().name,
        config=config,
        summary=summary,
        metrics=metrics,
        budget=budget,
        groups=groups,
        rollouts=rollouts,
        notes=notes.texts,
        chunks=bodies.finish(),
    )


def _collect_evaluation(folder: Path, notes: Notes) -> RunData:
    """The episodes of an evaluation, as one step without judgements."""
    bodies = _Chunks()
    groups: list[GroupEntry] = []
    rollouts: list[RolloutEntry] = []
    for group in read_episodes(folder / OUTCOMES, notes):
        chunk, place = bodies.add({**_group_body(1, group, notes), "tree": []})
        first = group[0]
        groups.append(GroupEntry(1, first.task_id, first.kind, _request(first), chunk, place))
        rollouts.extend(_index_entry(len(groups) - 1, i, row) for i, row in enumerate(group))
    name = folder.resolve().name
    return RunData(name, {}, {}, {}, [], groups, rollouts, notes.texts, bodies.finish())


def pack(value: object) -> str:
    """JSON, gzipped, base64: nothing in it can end a script element; equal input gives equal bytes."""
    return base64.b64encode(gzip.compress(_json(value).encode("ascii"), mtime=0)).decode("ascii")


class _Chunks:
    """Groups gathered until a chunk is full."""

    def __init__(self) -> None:
        self._packed: list[str] = []
        self._open: list[dict[str, object]] = []
        self._chars = 0

    def add(self, body: dict[str, object]) -> tuple[int, int]:
        """Returns (chunk, place in it)."""
        if self._chars > _CHUNK_CHARS:
            self._close()
        self._open.append(body)
        self._chars += len(_json(body))
        return len(self._packed), len(self._open) - 1

    def finish(self) -> list[str]:
        self._close()
        return self._packed

    def _close(self) -> None:
        if self._open:
            self._packed.append(pack(self._open))
        self._open, self._chars = [], 0


def _thinned(files: Sequence[tuple[int, Path]], limit: int) -> list[tuple[int, Path]]:
    counts = np.array([_count_lines(path) for _, path in files], dtype=np.int64)
    total = int(counts.sum())
    if total <= limit:
        return list(files)
    keep = max(2, int(len(files) * limit / total))
    places = np.unique(np.linspace(0, len(files) - 1, keep).round().astype(int))
    return [files[i] for i in places]


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _index_entry(group: int, place: int, row: RolloutRow) -> RolloutEntry:
    flags = (
        1 * row.harm
        + 2 * (row.done and not row.harm)
        + 4 * any(step.check is not None for step in row.steps)
        + 8 * (row.parent_id is not None)
        + 16 * (not all(step.well_formed for step in row.steps))
    )
    reward, advantage = _rounded(row.reward.total), _rounded(row.advantage)
    size = len(row.trained), len(row.steps)
    return RolloutEntry(group, place, row.rollout_id, row.status, flags, reward, advantage, *size)


def _group_body(step: int, group: Sequence[RolloutRow], notes: Notes) -> dict[str, object]:
    try:
        tree = [asdict(segment) for segment in group_tree(group)]
    except (ValueError, OverflowError) as error:
        notes.add(f"step {step}, group {group[0].group_id}: no prefix tree: {error}")
        tree = []
    matrix = decided(group)
    hidden = {"task_id", "kind", "split", "messages", "tools", "prompt_tokens", "cached_tokens", "token_ids"}
    hidden |= {"trained", "rollout_logprobs", "preferences", "reasons"}
    return {
        "messages": list(group[0].messages),
        "tools": list(group[0].tools),
        "preferences": None if matrix is None else [list(row) for row in matrix],
        "reasons": [list(row.reasons) for row in group] if matrix is not None else [],
        "tree": tree,
        "rollouts": [
            row.model_dump(mode="json", exclude=hidden)
            | {"tokens": len(row.token_ids), "generated": len(row.trained)}
            for row in group
        ],
    }


def _request(row: RolloutRow) -> str:
    """The beginning of the last opening message of the user."""
    texts = [m.get("content") for m in row.messages if m.get("role") == "user"]
    text = texts[-1] if texts and isinstance(texts[-1], str) else ""
    return " ".join(text[: 2 * _REQUEST_SHOWN].split())[:_REQUEST_SHOWN]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _json(value: object) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:  # a NaN, which JSON does not have
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
