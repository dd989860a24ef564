"""What a run is doing, seen from outside: from the files in its folder."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["start-up", "rollout", "update", "checkpoint", "finish"]
PHASES: tuple[Phase, ...] = ("start-up", "rollout", "update", "checkpoint", "finish")


@dataclass(frozen=True)
class State:
    """`step`: of the newest complete checkpoint, 0 without one."""

    phase: Phase
    step: int


def state_of(folder: Path, steps: int, *, opened: bool) -> State:
    """The state of a run of `steps` steps. opened: it has said that it has begun, it is not setting up.

    Trajectories of a step appear when it has been played and judged, its metrics when the weights are
    updated, its checkpoint under a temporary name while it is written.
    """
    checkpoints = folder / "checkpoints"
    step = max(numbers(checkpoints, r"step-(\d+)"), default=0)
    if not opened:
        return State("start-up", step)
    if step >= steps:
        return State("finish", step)
    if numbers(checkpoints, r"\.tmp-step-(\d+)"):
        return State("checkpoint", step)
    played = max(numbers(folder / "trajectories", r"step-(\d+)\.jsonl"), default=0)
    return State("update" if played > step else "rollout", step)


def numbers(folder: Path, pattern: str) -> list[int]:
    """The numbers in the names in a folder that match a pattern; none where there is no folder yet."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return [int(match[1]) for name in names if (match := re.fullmatch(pattern, name))]


def finished_trajectories(folder: Path) -> dict[str, tuple[str, int]]:
    """Complete trajectory files of a run: name -> (SHA-256, trajectories in it)."""
    found = {}
    for path in sorted((folder / "trajectories").glob("step-*.jsonl")):
        content = path.read_bytes()
        found[path.name] = (hashlib.sha256(content).hexdigest(), content.count(b"\n"))
    return found
