"""The folder of a run: its configuration, metrics, trajectories, checkpoints and summary."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from mosaic_fast.config import Config
from mosaic_fast.config.read import load_config, save_config
from mosaic_fast.config.resume import Change, changes
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.errors import TrainingError, UserError
from mosaic_fast.run import durable
from mosaic_rollout.plain_json import json_lines

_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system answers that knows no locks, as some network ones do not."""
_LOCK = ".lock"


class RunFolder:
    """Paths and writes of one run, locked until it is closed or the process ends, however it ends.

    A new run wants a folder that is missing or empty. Nothing is written before `open`, so that a mistake
    found while a run is set up leaves no folder behind: a folder made to claim its name is removed again.
    """

    def __init__(self, config: Config, name: str, *, resume: bool, world: World = ALONE) -> None:
        """Of several ranks the first one names and locks the folder, and it alone may write."""
        self._lock: int | None = None  # file descriptor
        self._resume, self._world = resume, world
        self._made: list[Path] = []  # folders that only claim the name, the outer ones first
        self.is_locked = False
        if config.run_dir:
            self.path = Path(config.run_dir)
        else:
            claimed = str(self._claim(name)) if world.is_first else None
            self.path = Path(str(world.from_first(claimed)))
        self.metrics_path = self.path / "metrics.jsonl"
        self.notes_path = self.path / "notes.jsonl"
        self.trajectories = self.path / "trajectories"
        self.checkpoints = self.path / "checkpoints"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir: {self.path} is a file; name a folder")
        if not world.is_first:
            return  # whether the folder is empty is the first rank's to see, before it writes there
        self._refuse_what_is_there()
        if resume and self.path.exists():
            self._take_lock()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder, and remove it where nothing was written in it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for path in reversed(self._made):
            with suppress(OSError):  # somebody else's run may be in the folder of runs by now
                path.rmdir()
        self._made = []

    def dated(self, config: Config) -> Config:
        """The configuration with the date that chat templates see: its own, the run's so far, or today's."""
        date, path = config.rollout.date, self.path / "config.toml"
        if date is None and path.is_file():
            date = load_config(path).rollout.date
        date = str(self._world.from_first(date or datetime.date.today().isoformat()))
        return config.model_copy(update={"rollout": config.rollout.model_copy(update={"date": date})})

    def open(self, config: Config, step: int, rows: int | None = None) -> list[Change]:
        """Make what is missing; forget what came after `step`: unfinished writes, metrics, trajectories.

        rows: the last step whose metrics are kept; None: `step`. Returns what a resumed run has anew.
        """
        with self.writing("the run folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._refuse_what_is_there()
            self._made = []
            self.trajectories.mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            for unfinished in [*self.path.glob(".tmp-*"), *self.path.glob("*/.tmp-*")]:
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
            changed = self._keep_config(config, step)
            for path in self.trajectories.glob("step-*.jsonl"):
                number = path.stem.removeprefix("step-")
                if number.isdecimal() and int(number) > step:
                    path.unlink()
            if self.metrics_path.exists():
                last = step if rows is None else rows
                kept = [json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= last]
                durable.write_text(self.metrics_path, "".join(kept))
            if self.notes_path.exists():
                durable.write_text(self.notes_path, self._notes_until(step))
        return changed

    def settle(self) -> None:
        """Force to disk what a checkpoint counts on: configuration, metrics, trajectories and their names."""
        with self.writing("the run folder"):
            for path in (*self.path.glob("*.toml"), *self.path.glob("*.jsonl")):
                durable.sync(path)
            for path in (self.trajectories, self.checkpoints, self.path, self.path.parent):
                durable.sync(path)

    def metrics(self) -> list[dict[str, float]]:
        return read_metrics_rows(self.metrics_path)

    def append_metrics(self, row: Mapping[str, float]) -> None:
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        with self.writing("metrics.jsonl"), self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def append_notes(self, step: int, notes: Sequence[str]) -> None:
        """Keep what was said of a step, counted from 1, in notes.jsonl."""
        if notes:
            with self.writing("notes.jsonl"), self.notes_path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, "note": note}) + "\n" for note in notes)

    def _notes_until(self, step: int) -> str:
        """The lines of notes.jsonl that are of a step up to this one; damaged ones are left out."""
        kept = []
        for line in self.notes_path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        return "".join(kept)

    def trajectory_path(self, step: int) -> Path:
        """The trajectory file of a training step, counted from 1."""
        return self.trajectories / f"step-{step:06d}.jsonl"

    def write_summary(self, summary: Mapping[str, object]) -> None:
        with self.writing("summary.json"):
            durable.write_text(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """TrainingError where the disk refuses a write."""
        try:
            yield
        except OSError as error:
            mend = "make it writable" if error.errno in _NOT_ALLOWED else "make room"
            raise TrainingError(
                f"{what} cannot be written in {self.path}: {error.strerror or error}. Checkpoints are "
                f"intact; {mend} and go on with --resume --run-dir {self.path}"
            ) from None

    def _claim(self, name: str) -> Path:
        """A folder of this run alone: made anew, whoever else starts a run in the same second."""
        runs, stamp = Path("runs"), time.strftime("%Y%m%d-%H%M%S")
        with self._named("runs"):
            if not runs.exists():
                self._made.append(runs)
            for number in range(1, 10_000):
                path = runs / (f"{stamp}-{name}" if number == 1 else f"{stamp}-{name}-{number}")
                with suppress(FileExistsError):
                    path.mkdir(parents=True)
                    self._made.append(path)
                    return path
        raise UserError(f"{runs} holds thousands of runs of this second; name a folder with --run-dir")

    def _refuse_what_is_there(self) -> None:
        if self._resume or not self.path.is_dir():
            return
        with self._named(str(self.path)):
            others = [path for path in self.path.iterdir() if path.name not in _BEFORE_OPEN]
        if others:
            raise UserError(
                f"run_dir: {self.path} is not empty; add --resume to go on with the run in it, "
                "or name another folder"
            )

    def _take_lock(self) -> None:
        """UserError where another process trains in the folder. The system frees it when a process ends."""
        if self._lock is not None:
            return
        with self.writing("the lock"):
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.is_locked = True
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"run_dir: another process is training in {self.path}; wait for it or stop it, or name "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        self._lock = descriptor

    def _keep_config(self, config: Config, step: int) -> list[Change]:
        """Write the configuration; where a resumed run has values anew, note them with the step."""
        path = self.path / "config.toml"
        if not path.exists():
            save_config(config, path)
            return []
        stored = load_config(path).resolved()
        if stored.rollout.date is None:  # of a version that kept none
            rollout = stored.rollout.model_copy(update={"date": config.rollout.date})
            stored = stored.model_copy(update={"rollout": rollout})
        changed = changes(stored, config.resolved())
        if changed:
            row = {"after_step": step, "changed": {c.key: [c.before, c.after] for c in changed}}
            with (self.path / "changes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            save_config(config, path)
        return changed

    @staticmethod
    @contextmanager
    def _named(folder: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run_dir: {folder} cannot be used: {error.strerror or error}") from None


PLANS = "plans.sqlite"
"""Plans that a model wrote for a cold start, which are kept the moment they arrive."""
_BEFORE_OPEN = frozenset({_LOCK, "sglang", PLANS})
"""What may lie in the folder of a new run before it is opened: its lock, the place of its servers, plans."""


def read_metrics_rows(path: Path) -> list[dict[str, float]]:
    """Every sound row of metrics.jsonl; a last line cut off by a crash is left out, or a damaged one."""
    if not path.exists():
        return []
    rows = []
    for _, line in json_lines(path.read_text(encoding="utf-8", errors="replace")):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(map(_is_figure, row.values())):
            rows += [row] if "step" in row else []
    return rows


def _is_figure(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
