"""train: the default training run, python -m mosaic_fast.train, and what its time goes into.

8 steps of the embedded agent in the embedded world (--quick: 3), without evaluations. A thread looks every
2 ms where the run is; what counts is the innermost of our own files on the stack:

    engine    sampling, in process: the loop waits for it
    update    forward, loss, backward, optimiser
    agents    the agent loop, chat template, grammar, environments
    packing   the forest, plans and index arrays
    other     judge, rewards, files, metrics
    start-up  loading, before the first step and after the last; not part of the shares

ours = median seconds a step. There is no flat run. ideal = 1: all time in the model's arithmetic or waiting
for the engine; of ideal = the share that is, which should be at least 85%.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

import torch
from measure import Result, Timing

from mosaic_fast.config_io import parse_train_arguments
from mosaic_fast.train import train

FORMULA = "ideal = 1, of ideal = share of time in the engine or in forward, loss, backward and optimiser"

VARIANTS = DEFAULT = QUICK = ("train",)

_PLACES = (
    ("mosaic_rollout/engine/", "engine"),
    ("mosaic_rollout/", "agents"),
    ("mosaic_fast/policy/forest_tensors", "packing"),
    ("mosaic_fast/execution/schedule", "packing"),
    ("mosaic_fast/execution/cost", "packing"),
    ("mosaic_kernels/forest", "packing"),
    ("mosaic_kernels/split", "packing"),
    ("mosaic_kernels/attention/plan", "packing"),
    ("mosaic_kernels/", "update"),
    ("mosaic_fast/policy/", "update"),
    ("mosaic_fast/execution/", "update"),
    ("mosaic_fast/loss/", "update"),
    ("mosaic_fast/passes", "update"),
    ("mosaic_fast/optimizer", "update"),
    ("mosaic_fast/", "other"),
)
PARTS = ("engine", "update", "agents", "packing", "other")
OUTSIDE = "start-up"


def place_of(frame: FrameType | None) -> str:
    """Which part the innermost of our own frames belongs to; OUTSIDE where no training step is under way."""
    found = None
    while frame is not None:
        name = frame.f_code.co_filename
        found = found or next((part for path, part in _PLACES if path in name), None)
        if frame.f_code.co_name == "step" and name.endswith("mosaic_fast/train.py"):
            return found or "other"
        frame = frame.f_back
    return OUTSIDE


class Sampler(threading.Thread):
    """Counts where another thread is, every 2 ms, while it is entered."""

    def __init__(self, watched: int) -> None:
        super().__init__(daemon=True)
        self._watched, self._stop_asked = watched, threading.Event()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        while not self._stop_asked.wait(0.002):
            self.counts[place_of(sys._current_frames().get(self._watched))] += 1

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()


def _train(steps: int, folder: Path) -> list[dict[str, float]]:
    """The metrics of each step of a run."""
    run = folder / "run"
    options = ["--steps", str(steps), "--env.eval-tasks", "0", "--trackers.console", "quiet"]
    threads = torch.get_num_threads()
    config, _, name = parse_train_arguments([*options, "--run-dir", str(run)])
    try:
        train(config, name)
    finally:
        torch.set_num_threads(threads)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check(name: str, quick: bool) -> None:
    """Two runs of two steps agree in every metric that is not a time, bit for bit."""
    runs = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            rows = _train(2, Path(folder))
        runs.append([{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows])
    assert runs[0] == runs[1], "two runs of the same seed differ"
    assert all(row["optim/grad_norm"] > 0 for row in runs[0]), "a step has no gradient"


def ideal() -> float:
    return 1.0


def run(name: str, quick: bool) -> Result:
    with tempfile.TemporaryDirectory() as folder, Sampler(threading.get_ident()) as sampler:
        start = time.perf_counter()
        rows = _train(3 if quick else 8, Path(folder))
        total = time.perf_counter() - start
    # The first step pays for what is done once, such as allocating memory; loading is in no step.
    steps = [row["time/step_s"] for row in rows[1:]]
    median = statistics.median(steps)
    counted = sum(sampler.counts[part] for part in PARTS)
    shares = {f"{part}_frac": sampler.counts[part] / counted for part in PARTS}
    phases = {
        f"{phase}_s": statistics.median(row[f"time/{phase}_s"] for row in rows[1:])
        for phase in ("rollout", "judge", "update")
    }
    share = shares["engine_frac"] + shares["update_frac"]
    return Result(
        median_s=median,
        spread=(max(steps) - min(steps)) / median,
        flat_median_s=math.nan,
        ratio_to_flat=share,
        ideal=ideal(),
        share_of_ideal=share / ideal(),
        extra={
            "raw_tokens": statistics.median(row["tree/raw_tokens"] for row in rows),
            "unique_tokens": statistics.median(row["tree/unique_tokens"] for row in rows),
            "run_s": total,
            **phases,
            **shares,
        },
        contenders={"ours": Timing(median, (max(steps) - min(steps)) / median)},
    )
