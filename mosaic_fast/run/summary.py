"""What a run leaves when it ends: summary.json, the curves, and the lines that say where things lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mosaic_fast.learner.checkpoint import Progress, checkpoint_path
from mosaic_fast.run.folder import RunFolder
from mosaic_fast.run.metrics import Rate, pairs_of, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAFETY = {
    "safety/harmful_refused": ("harmful refused", "tab:green"),
    "safety/benign_done": ("benign done", "tab:blue"),
    "safety/injected_done": ("injected done", "tab:cyan"),
    "safety/injection_harm": ("injection harm", "tab:red"),
    "safety/benign_refused": ("benign refused", "tab:orange"),
}
_GATE = {
    "rollout/gate_rate_harmful": ("checks, harmful", "tab:green"),
    "rollout/gate_rate_injected": ("checks, injected", "tab:red"),
    "rollout/gate_rate_benign": ("checks, benign", "tab:blue"),
    "rollout/safety_token_share": ("safety tokens", "tab:grey"),
}
_REWARD = {
    "reward/format": ("r_fmt", "tab:blue"),
    "reward/length_penalty": ("p_len", "tab:orange"),
    "reward/tied_groups_frac": ("groups of ties", "tab:grey"),
}
_LOSS = {
    "policy/nll": ("nats a token", "tab:blue"),
    "heldout/nll": ("held out", "tab:orange"),
    "policy/entropy": ("entropy", "tab:grey"),
}
_COINCIDE = 0.02
"""Rates nearer than this have dots that cover each other."""
_TIME = {"time/rollout_s": "roll out", "time/update_s": "update", "time/checkpoint_s": "checkpoint"}


def write_summary(
    folder: RunFolder,
    progress: Progress,
    before: Mapping[str, Rate],  # held-out rates before training; empty where there was no evaluation
    after: Mapping[str, Rate],
    seed: int,
    eval_tasks: int,
    judge: Mapping[str, object] | None,  # what tells the judge from others, where it is a model
    *,
    complete: bool,
) -> None:
    """Write summary.json and the curves. TrainingError where the disk refuses."""
    summary = {
        "seed": seed,
        "steps": progress.step,
        "complete": complete,
        "train_s": round(progress.train_s, 2),
        "eval_tasks": eval_tasks,
        "before": values_of(before),
        "after": values_of(after),
        "counts": {"before": pairs_of(before), "after": pairs_of(after)},
        **({"judge": judge} if judge else {}),
    }
    folder.write_summary(summary)
    title = f"{folder.path.name}: {progress.step} steps, seed {seed}, {progress.train_s:.0f} s"
    with folder.writing("the curves"):
        draw_curves(folder.metrics(), values_of(before), values_of(after), folder.path, title)


def closing_lines(folder: RunFolder, progress: Progress, command: str, *, complete: bool) -> list[str]:
    """What the terminal says last: where things lie, and how to go on with a run that was stopped."""
    lines = [
        f"{progress.step} steps in {progress.train_s:.0f} s of training",
        f"curves        {folder.path / 'curves.png'}",
        f"trajectories  {folder.trajectories}",
    ]
    checkpoint = checkpoint_path(folder.checkpoints, progress)
    if checkpoint.is_dir():
        lines.append(f"checkpoint    {checkpoint}")
    if not complete:
        lines.append(f"stopped; go on with: python -m {command} --resume --run-dir {folder.path}")
    return lines


def draw_curves(
    rows: Sequence[Mapping[str, float]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    folder: Path,
    title: str,
) -> list[Path]:
    """Write curves.svg and curves.png. Lines are training rollouts, smoothed; dots are held-out, greedy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that no first step waits for
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    steps = np.array([row["step"] for row in rows])
    _lines(axes[0, 0], steps, rows, _SAFETY)
    last = float(steps[-1]) if len(steps) else 0.0
    supervised = any("policy/nll" in row for row in rows)
    drawn: list[tuple[float, float]] = []
    for name, (label, colour) in _SAFETY.items():
        dots = [(place, rates[name]) for place, rates in ((0.0, before), (last, after)) if name in rates]
        for number, (place, value) in enumerate(dots):
            legend = {"label": label} if supervised and not number else {}  # there are no lines that have it
            axes[0, 0].plot(place, value, color=colour, clip_on=False, **_mark(drawn, place, value), **legend)
            drawn.append((place, value))
    lines = "" if supervised else "lines: training; "
    axes[0, 0].set(title=f"what it does ({lines}dots and rings: held-out, greedy)", ylim=(0, 1))
    _lines(axes[0, 1], steps, rows, _GATE)
    axes[0, 1].set(title="checks in the conversations" if supervised else "the learned gate", ylim=(0, 1))
    if supervised:
        _lines(axes[1, 0], steps, rows, _LOSS)
        axes[1, 0].set(title="how well conversations are predicted", xlabel="step")
    else:
        _lines(axes[1, 0], steps, rows, _REWARD)
        axes[1, 0].set(title="reward parts (r_align has a fixed mean)", xlabel="step")
    bottom = np.zeros(len(rows))
    for name, label in _TIME.items():
        height = np.array([row.get(name, 0.0) for row in rows])
        axes[1, 1].bar(steps, height, bottom=bottom, width=1.0, label=label)
        bottom += height
    axes[1, 1].set(title="seconds a step", xlabel="step")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, parse_math=False)  # it has the folder's name in it
    paths = [folder / "curves.svg", folder / "curves.png"]
    for path in paths:
        unfinished = path.with_name(f".tmp-{path.name}")
        figure.savefig(unfinished, format=path.suffix[1:], dpi=110)
        unfinished.replace(path)
    return paths


def _mark(drawn: Sequence[tuple[float, float]], place: float, value: float) -> Mapping[str, Any]:
    """How a dot is marked: as a ring around those that it would hide, wider for each, else as a dot."""
    hidden = sum(place == other and abs(value - height) < _COINCIDE for other, height in drawn)
    if not hidden:
        return {"marker": "o", "markersize": 7}
    return {"marker": "o", "markersize": 7 + 5 * hidden, "fillstyle": "none", "markeredgewidth": 1.6}


def _lines(
    axis: Axes, steps: np.ndarray, rows: Sequence[Mapping[str, float]], series: Mapping[str, tuple[str, str]]
) -> None:
    """One smoothed line a metric; steps without it are left out."""
    for name, (label, colour) in series.items():
        present = np.array([name in row for row in rows], dtype=bool)
        if present.any():
            values = np.array([row[name] for row in rows if name in row])
            axis.plot(steps[present], _smooth(values), color=colour, label=label, linewidth=1.8)


def _smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Mean over a window of `width` that shrinks at the ends."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
