"""One process of a training run, and the moment at which it is killed.

What the run is doing is seen from outside, by the files in its folder.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mosaic_fast.errors import TrainingError

Phase = Literal["start-up", "rollout", "update", "checkpoint", "finish"]
PHASES: tuple[Phase, ...] = ("start-up", "rollout", "update", "checkpoint", "finish")


@dataclass(frozen=True)
class State:
    """What a run is doing. step: that of its newest complete checkpoint, 0 without one."""

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


_LOOK_EVERY_S = 0.001
_LONGEST_S = 600.0  # a life without an end is a run that hangs


@dataclass(frozen=True)
class Timing:
    """Seconds of each phase in the undisturbed run, those of a step for one step."""

    seconds: dict[Phase, float]

    @property
    def of_a_life(self) -> float:
        """Seconds from the start of the process to the end of three steps."""
        one = sum(self.seconds[phase] for phase in ("rollout", "update", "checkpoint"))
        return self.seconds["start-up"] + 3 * one


@dataclass(frozen=True)
class Aim:
    """When to kill: `fraction` of a phase after it began in some step, or of a whole life."""

    phase: Phase | Literal["life"]
    steps_ahead: int
    fraction: float


def draw_aim(random: random.Random, steps_left: int) -> Aim:
    """Writing a checkpoint takes a tenth of a step, and is aimed at more often than the rest of it."""
    weights: dict[Phase | Literal["life"], float] = {"life": 1.0, "start-up": 0.6}
    if steps_left > 0:
        weights |= {"rollout": 1.0, "update": 1.0, "checkpoint": 1.5}
    if steps_left <= 1:
        weights |= {"finish": 2.0}
    (phase,) = random.choices(list(weights), list(weights.values()))
    return Aim(phase, random.choice((0, 1, 2)), random.random())


class Victim:
    """A training process, which goes on with what is in its folder. Its output goes to a file."""

    def __init__(self, folder: Path, options: list[str], steps: int, output: Path) -> None:
        self.folder, self.steps, self.output = folder, steps, output
        resume = ["--resume"] if folder.exists() else []
        command = [sys.executable, "-m", "mosaic_fast.train", *options, "--run-dir", str(folder), *resume]
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._started = time.monotonic()

    def state(self) -> State:
        return state_of(self.folder, self.steps, opened=self.output.stat().st_size > 0)

    def kill_at(self, aim: Aim, timing: Timing) -> State | None:
        """Kill the process at the moment aimed at: what it was doing, or None if it ended before that."""
        if aim.phase in ("life", "start-up"):
            whole = timing.of_a_life if aim.phase == "life" else timing.seconds["start-up"]
            moment = self._started + aim.fraction * whole
        else:
            first = min(self.state().step + aim.steps_ahead, self.steps - 1)

            def begun() -> bool:
                state = self.state()
                return state.phase == "finish" or (state.phase == aim.phase and state.step >= first)

            self._wait(begun)
            moment = time.monotonic() + aim.fraction * timing.seconds[aim.phase]
        self._wait(lambda: time.monotonic() >= moment)
        if self.process.poll() is not None:
            return None
        self.stop()
        return self.state()

    def wait_for_end(self) -> dict[Phase, float]:
        """Let it end by itself; the seconds that each phase took in all."""
        seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        last = self._started

        def note() -> bool:
            nonlocal last
            now = time.monotonic()
            seconds[self.state().phase] += now - last
            last = now
            return False

        self._wait(note)
        return seconds

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _wait(self, until: Callable[[], bool]) -> None:
        """Wait until `until()` is true or the process has ended. TrainingError where neither happens."""
        try:
            while self.process.poll() is None and not until():
                if time.monotonic() - self._started > _LONGEST_S:
                    raise TrainingError(f"{self.folder} hangs; its output is in {self.output}")
                time.sleep(_LOOK_EVERY_S)
        except BaseException:  # Ctrl-C: it would outlive this process
            self.stop()
            raise
