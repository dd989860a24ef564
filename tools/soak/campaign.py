"""Runs that are killed and resumed until there were enough kills, each compared with an undisturbed run.

But for what clocks say, a run that was killed and resumed must differ from it in nothing.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mosaic_fast.errors import TrainingError
from mosaic_fast.learner.checkpoint import latest_checkpoint
from mosaic_rollout.plain_json import read_lines
from tools.soak.victim import Phase, Timing, Victim, draw_aim, finished_trajectories

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


@dataclass
class Tally:
    """What happened so far."""

    kills: Counter[Phase] = field(default_factory=Counter)  # what the run was doing -> kills
    runs: int = 0  # completed and compared
    trajectories: int = 0  # finished ones that were on disk at some kill, each counted once
    lost: int = 0  # those of them that the completed run does not have with the same bytes
    losses: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        return sum(self.kills.values())


class Campaign:
    """An undisturbed run, and runs that are killed and resumed until they are complete, in one folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.undisturbed = folder / "undisturbed"
        self.options = [
            *("--steps", str(steps), "--env.eval-tasks", "3", "--rollout.prompts-per-step", "2"),
            *("--model.threads", "1", "--model.device", "cpu", "--trackers.console", "plain"),
        ]
        self.tally = Tally()
        self._under_way = False  # a run was started and is not complete yet
        self._step = 0  # newest checkpoint of the run under way, as of its last kill
        self._seen: dict[str, tuple[str, int]] = {}  # its finished trajectories, as of any kill

    def train_undisturbed(self) -> Timing:
        """Make the run that the others have to equal. TrainingError if it fails."""
        victim = Victim(self.undisturbed, self.options, self.steps, self.folder / "undisturbed.log")
        seconds = victim.wait_for_end()
        if victim.process.returncode:
            raise TrainingError(f"the undisturbed run failed; its output is in {victim.output}")
        of_one_step = {p: s / self.steps for p, s in seconds.items() if p not in ("start-up", "finish")}
        return Timing({**seconds, **of_one_step})

    def kill_and_resume(
        self, kills: int, random: random.Random, timing: Timing, tell: Callable[[Tally], None]
    ) -> Tally:
        """Runs with `kills` kills in all, the last one completed; stops early at a run that cannot go on."""
        while self.tally.killed < kills or self._under_way:
            self._under_way = True
            run = self.folder / f"run-{self.tally.runs + 1:03d}"
            victim = Victim(run, self.options, self.steps, run.with_suffix(".log"))
            if self.tally.killed < kills:
                state = victim.kill_at(draw_aim(random, self.steps - self._step), timing)
            else:
                victim.wait_for_end()
                state = None
            if state is not None:
                self.tally.kills[state.phase] += 1
                self._note(run, state.step)
            elif victim.process.returncode:
                said = victim.output.read_text(encoding="utf-8", errors="replace").strip()[-500:]
                self.tally.losses.append(
                    f"{run.name} cannot go on, status {victim.process.returncode}: {said}"
                )
                return self.tally
            else:
                self._compare(run)
            tell(self.tally)
        return self.tally

    def _note(self, run: Path, step: int) -> None:
        """Remember what a killed run has left on disk, which has to be there later."""
        if step < self._step:
            self.tally.losses.append(f"{run.name}: was at step {self._step}, and is at step {step}")
        found = finished_trajectories(run)
        for name in sorted(found.keys() & self._seen.keys()):
            if found[name] != self._seen[name]:
                self.tally.losses.append(f"{run.name}: {name} was written anew with other trajectories")
        self._step, self._seen = step, found | self._seen

    def _compare(self, run: Path) -> None:
        """A completed run: against the undisturbed one, and against what was seen of it at kills."""
        kept = finished_trajectories(run)
        lost = {
            name: count for name, (digest, count) in self._seen.items() if kept.get(name) != (digest, count)
        }
        found = [f"{name}: {count} finished trajectories lost" for name, count in lost.items()]
        found += differences(run, self.undisturbed)
        tally = self.tally
        tally.runs += 1
        tally.trajectories += sum(count for _, count in self._seen.values())
        tally.lost += sum(lost.values())
        tally.losses += [f"{run.name}: {difference}" for difference in found]
        if not found:
            shutil.rmtree(run)
            run.with_suffix(".log").unlink()
        self._under_way, self._step, self._seen = False, 0, {}
