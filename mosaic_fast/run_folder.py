"""The folder of a run: its configuration, metrics, trajectories, checkpoints and summary."""

from __future__ import annotations

import errno
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mosaic_fast.config import Config
from mosaic_fast.config_io import save_config
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.errors import TrainingError, UserError

_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class RunFolder:
    """Paths and writes of one run.

    A new run wants a folder that is missing or empty. Nothing is written before `open`, so that a mistake
    found while a run is set up leaves no folder behind.
    """

    def __init__(self, config: Config, name: str, *, resume: bool, world: World = ALONE) -> None:
        """Of several ranks the first one names the folder, and it alone may write."""
        stamp = world.from_first(time.strftime("%Y%m%d-%H%M%S"))
        self.path = Path(config.run_dir) if config.run_dir else Path("runs") / f"{stamp}-{name}"
        if not world.is_first:
            resume = True  # whether the folder is empty is the first rank's to see, before it writes there
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir: {self.path} is a file; name a folder")
        if not resume and self.path.exists() and any(self.path.iterdir()):
            raise UserError(
                f"run_dir: {self.path} is not empty; add --resume to go on with the run in it, "
                "or name another folder"
            )
        self.metrics_path = self.path / "metrics.jsonl"
        self.trajectories = self.path / "trajectories"
        self.checkpoints = self.path / "checkpoints"

    def open(self, config: Config, step: int) -> None:
        """Make what is missing; forget what came after `step`: unfinished writes, metrics, trajectories."""
        with self.writing("the run folder"):
            self.trajectories.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            for unfinished in [*self.path.glob(".tmp-*"), *self.path.glob("*/.tmp-*")]:
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
            if not (self.path / "config.toml").exists():
                save_config(config, self.path / ".tmp-config.toml")
                (self.path / ".tmp-config.toml").replace(self.path / "config.toml")
            for path in self.trajectories.glob("step-*.jsonl"):
                number = path.stem.removeprefix("step-")
                if number.isdecimal() and int(number) > step:
                    path.unlink()
            if self.metrics_path.exists():
                kept = [json.dumps(row) + "\n" for row in self.metrics() if row["step"] <= step]
                self._replace("metrics.jsonl", "".join(kept))

    def metrics(self) -> list[dict[str, float]]:
        """Every sound row of metrics.jsonl; a last line cut off by a crash is left out, or a damaged one."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and all(map(_is_figure, row.values())):
                rows += [row] if "step" in row else []
        return rows

    def append_metrics(self, row: Mapping[str, float]) -> None:
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        with self.writing("metrics.jsonl"), self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def trajectory_path(self, step: int) -> Path:
        return self.trajectories / f"step-{step:06d}.jsonl"

    def write_summary(self, summary: Mapping[str, object]) -> None:
        with self.writing("summary.json"):
            self._replace("summary.json", json.dumps(summary, indent=1) + "\n")

    def _replace(self, name: str, text: str) -> None:
        unfinished = self.path / f".tmp-{name}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.path / name)

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


def _is_figure(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
