"""The real packages, offline: MOSAIC_TEST_TRACKERS=1, after pip install tensorboard wandb trackio."""

import importlib
import sqlite3
from pathlib import Path

import pytest

from mosaic_fast.run.trackers import Trackers
from tests.report.test_trackers import logging_to

ROWS = [{"step": float(step), "safety/harmful_refused": step / 10} for step in range(1, 6)]


def log_all(name: str, folder: Path) -> None:
    with Trackers(logging_to(name), folder) as trackers:
        for row in ROWS:
            trackers.log(row)


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path):
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    log_all("tensorboard", tmp_path)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, round(event.value, 6)) for event in events.Scalars("safety/harmful_refused")]
    assert found == [(step, step / 10) for step in range(1, 6)]


def test_wandb_offline_leaves_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_all("wandb", tmp_path)
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"safety/harmful_refused" in stored.read_bytes()


def test_trackio_keeps_the_run_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    log_all("trackio", tmp_path)
    (stored,) = tmp_path.glob("p*.db")
    with sqlite3.connect(stored) as database:
        (count,) = database.execute("SELECT count(*) FROM metrics").fetchone()
    assert count == len(ROWS)
