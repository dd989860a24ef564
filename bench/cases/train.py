"""train: the default training run, python -m mosaic_fast.train, and what its time goes into.

6 steps of the embedded agent in the embedded world (--quick: 3), without evaluations. A thread looks every
2 ms where the run is; what counts is the innermost of our own files on the stack:

    engine    sampling, in process: the loop waits for it
    update    forward, loss, backward, optimiser
    agents    the agent loop, chat template, grammar, environments
    packing   the forest, plans and index arrays
    other     judge, rewards, files, metrics

Start-up is not part of the shares and is told apart by a run of one step in a new process: imports, loading
and closing (curves, summary), and what the first step takes beyond the same one in a warm process.

ours = median seconds a step. There is no flat run. ideal = 1: all time in the model's arithmetic or waiting
for the engine; of ideal = the share that is, which should be at least 85%.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import torch
from agreement import Missing
from device import Place
from measure import Result, Timing

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.train import train

FORMULA = "ideal = 1, of ideal = share of time in the engine or in forward, loss, backward and optimiser"

VARIANTS = DEFAULT = QUICK = ("train",)
ON_CPU = True
SECONDS = {"train": 26}

_PLACES = (
    ("mosaic_rollout/engine/", "engine"),
    ("mosaic_rollout/", "agents"),
    ("mosaic_fast/policy/forest_tensors", "packing"),
    ("mosaic_fast/learner/execution/schedule", "packing"),
    ("mosaic_fast/learner/execution/cost", "packing"),
    ("mosaic_kernels/forest", "packing"),
    ("mosaic_kernels/attention/plan", "packing"),
    ("mosaic_kernels/", "update"),
    ("mosaic_fast/policy/", "update"),
    ("mosaic_fast/learner/execution/", "update"),
    ("mosaic_fast/losses/", "update"),
    ("mosaic_fast/learner/checkpoint", "other"),
    ("mosaic_fast/learner/", "update"),
    ("mosaic_fast/", "other"),
)
PARTS = ("engine", "update", "agents", "packing", "other")
OUTSIDE = "start-up"
OPTIONS = ("--env.eval-tasks", "0", "--trackers.console", "quiet")


def place_of(frame: FrameType | None) -> tuple[str, str]:
    """The part that the innermost of our own frames belongs to, and its name; OUTSIDE between the steps."""
    found, name = "", ""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if not found:
            found = next((part for path, part in _PLACES if path in file), "")
            name = f"{Path(file).name}:{function}"
        if function == "step" and file.endswith("mosaic_fast/training.py"):
            return found or "other", name
        frame = frame.f_back
    return OUTSIDE, ""


class Sampler(threading.Thread):
    """Counts where another thread is, every 2 ms, while it is entered."""

    def __init__(self, watched: int) -> None:
        super().__init__(daemon=True)
        self._watched, self._stop_asked = watched, threading.Event()
        self.counts: Counter[str] = Counter()
        self.names: Counter[str] = Counter()  # functions of ours that are neither engine nor update

    def run(self) -> None:
        while not self._stop_asked.wait(0.002):
            part, name = place_of(sys._current_frames().get(self._watched))
            self.counts[part] += 1
            if part not in ("engine", "update", OUTSIDE):
                self.names[name] += 1

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()


def _train(steps: int, folder: Path) -> list[dict[str, float]]:
    """The metrics of each step of a run."""
    run = folder / "run"
    threads = torch.get_num_threads()
    config, _, name = parse_train_arguments([*OPTIONS, "--steps", str(steps), "--run-dir", str(run)])
    try:
        train(config, name)
    finally:
        torch.set_num_threads(threads)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


_NEW_PROCESS = """
import sys, time
start = time.perf_counter()
from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.train import train
print(time.perf_counter() - start)
config, _, name = parse_train_arguments(sys.argv[1:])
train(config, name)
"""


def start_up(warm_first_step_s: float) -> dict[str, float]:
    """Seconds of a run of one step in a new process, but for those that the same step takes here, warm."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = [*OPTIONS, "--steps", "1", "--run-dir", str(run)]
        start = time.perf_counter()
        said = subprocess.run(
            [sys.executable, "-c", _NEW_PROCESS, *options], check=True, capture_output=True, text=True
        )
        total = time.perf_counter() - start
        [row] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    imports, step = float(said.stdout.splitlines()[0]), row["time/step_s"]
    return {
        "imports_s": imports,
        "loading_and_closing_s": total - imports - step,
        "first_step_more_s": step - warm_first_step_s,
    }


def check(name: str, quick: bool, place: Place) -> Missing:
    """Two runs of two steps agree in every metric that is not a time, bit for bit."""
    runs = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            rows = _train(2, Path(folder))
        runs.append([{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows])
    assert runs[0] == runs[1], "two runs of the same seed differ"
    assert all(row["optim/grad_norm"] > 0 for row in runs[0]), "a step has no gradient"
    return {}


def ideal() -> float:
    return 1.0


def run(name: str, quick: bool, place: Place, missing: Missing) -> Result:
    with tempfile.TemporaryDirectory() as folder, Sampler(threading.get_ident()) as sampler:
        start = time.perf_counter()
        rows = _train(3 if quick else 6, Path(folder))
        end = time.perf_counter()
    steps = [row["time/step_s"] for row in rows[1:]]
    median = statistics.median(steps)
    counted = sum(sampler.counts[part] for part in PARTS)
    shares = {f"{part}_frac": sampler.counts[part] / counted for part in PARTS}
    before = start_up(rows[0]["time/step_s"])
    _print(name, {part: sampler.counts[part] / counted for part in PARTS}, before, sampler.names)
    phases = {
        f"{phase}_s": statistics.median(row[f"time/{phase}_s"] for row in rows[1:])
        for phase in ("rollout", "judge", "update", "checkpoint")
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
            "run_s": end - start,
            **before,
            **phases,
            **shares,
        },
        contenders={"ours": Timing(median, (max(steps) - min(steps)) / median)},
    )


def _print(name: str, shares: Mapping[str, float], before: Mapping[str, float], names: Counter[str]) -> None:
    """Where the time of the steps went, and what start-up took."""
    lines = [f"{part} {share:.1%}" for part, share in shares.items()]
    print(f"{name}: of the steps' time: {', '.join(lines)}")
    rest = names.total() or 1
    most = [f"{one} {count / rest:.0%}" for one, count in names.most_common(8)]
    print(f"{name}: of what is neither engine nor update: {', '.join(most)}")
    taken = [f"{what.removesuffix('_s').replace('_', ' ')} {s:.2f} s" for what, s in before.items()]
    print(f"{name}: start-up of a new process, not in these shares: {', '.join(taken)}", flush=True)
