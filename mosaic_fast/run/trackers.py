"""Trackers beside metrics.jsonl: Weights & Biases, Trackio, TensorBoard; imported only where named."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Protocol

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError


class Tracker(Protocol):
    """Takes a run's metrics, a row a step."""

    def log(self, step: int, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Every tracker of `trackers.log_to`, for the duration of a `with` block."""

    def __init__(self, config: Config, folder: Path, *, active: bool = True) -> None:
        """active: False on all ranks but one; no tracker is opened then."""
        self._trackers = [_open(name, config, folder) for name in config.trackers.log_to if active]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.close()

    def log(self, row: Mapping[str, float]) -> None:
        """A row of metrics.jsonl; its `step` is the step."""
        values = {name: value for name, value in row.items() if name != "step"}
        for tracker in self._trackers:
            tracker.log(int(row["step"]), values)


def require_trackers(config: Config) -> None:
    """UserError for a tracker whose package is not installed, before a run has begun."""
    for name in config.trackers.log_to:
        _package(name)


def _open(name: str, config: Config, folder: Path) -> Tracker:
    package = _package(name)
    return _TensorBoard(folder) if name == "tensorboard" else _Hosted(name, package, config, folder)


class _TensorBoard:
    """Event files in <run folder>/tensorboard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Hosted:
    """wandb and trackio share an interface: init, log, finish. A resumed run goes on under its name."""

    def __init__(self, name: str, package: ModuleType, config: Config, folder: Path) -> None:
        self._package = package
        run = folder.resolve().name
        place = {"id": run, "dir": str(folder)} if name == "wandb" else {}
        package.init(
            project=config.trackers.project,
            name=run,
            config=config.model_dump(mode="json"),
            resume="allow",
            **place,
        )

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._package.log(dict(row), step=step)

    def close(self) -> None:
        self._package.finish()


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"trackers.log_to has {name!r}, which cannot be imported ({error}): "
            f"pip install 'mosaic-fast[{name}]', or leave it out"
        ) from None
