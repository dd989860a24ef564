"""In what two finished runs differ. Clocks apart, the answer for a resumed run has to be: in nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mosaic_fast.checkpoint import latest_checkpoint
from mosaic_fast.soak.state import finished_trajectories
from mosaic_rollout.json_lines import read_lines

_NOT_CLOCKED = ("seed", "steps", "complete", "eval_tasks", "before", "after", "counts")
_PROGRESS, _MANIFEST = "progress.json", "manifest.json"


def differences(run: Path, undisturbed: Path) -> list[str]:
    """One line for everything in which `run` is not `undisturbed`; empty if they are the same, bit for bit.

    Compared: every file of the last checkpoint (weights, optimiser, random state, tokenizer), every metric
    of every step but seconds and tokens a second, every trajectory, the figures before and after training.
    """
    found = []
    ours, theirs = (latest_checkpoint(folder / "checkpoints") for folder in (run, undisturbed))
    if ours is None or theirs is None or ours.name != theirs.name:
        found.append(f"last checkpoint: {ours and ours.name} instead of {theirs and theirs.name}")
    else:
        contents = [_checkpoint(folder) for folder in (ours, theirs)]
        found += [f"checkpoint {ours.name}: {name}" for name in _unequal(*contents)]
    found += [
        f"metrics of step {step}" for step in _unequal(*(_metrics(folder) for folder in (run, undisturbed)))
    ]
    trajectories = [finished_trajectories(folder) for folder in (run, undisturbed)]
    found += [f"trajectories {name}" for name in _unequal(*trajectories)]
    summaries = [
        json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (run, undisturbed)
    ]
    found += [f"summary: {key}" for key in _NOT_CLOCKED if summaries[0].get(key) != summaries[1].get(key)]
    return found + [f"left over: {path.relative_to(run)}" for path in sorted(run.rglob(".tmp-*"))]


def _checkpoint(folder: Path) -> dict[str, object]:
    """Name of a file -> what is in it, without the seconds and without the checksums, seconds' included."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found: dict[str, object] = {name: path.read_bytes() for name, path in files.items() if name != _MANIFEST}
    progress = json.loads(files[_PROGRESS].read_text(encoding="utf-8"))
    # A run stopped in the evaluation of its last step keeps the step before that is made.
    return found | {_PROGRESS: {k: v for k, v in progress.items() if k not in ("train_s", "unevaluated")}}


def _metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Position and step of a row -> what was learnt, without what a clock gives."""
    rows = [json.loads(line) for _, line in read_lines(folder / "metrics.jsonl")]
    return {
        f"{row['step']:.0f} (row {index + 1})": {
            name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))
        }
        for index, row in enumerate(rows)
    }


def _unequal(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """The keys that only one side has, or whose values differ."""
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
