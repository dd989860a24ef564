"""One folder, one run: claimed by whoever comes first, locked for as long as the process lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError
from mosaic_fast.run import durable
from mosaic_fast.run.folder import RunFolder
from tests.faults.conftest import run

_HOLD = """
import sys, time
from mosaic_fast.config import Config
from mosaic_fast.run.folder import RunFolder
folder = RunFolder(Config(run_dir=sys.argv[1]), "world", resume=False)
folder.open(Config(run_dir=sys.argv[1]), 0)
print("held", flush=True)
time.sleep(60)
"""


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20300101-000000")
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: RunFolder(Config(), "world", resume=False), range(16)))
    assert len({folder.path for folder in made}) == 16
    made[0].open(Config(), 0)
    for folder in made:
        folder.close()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [
        made[0].path.name
    ]  # unused ones are gone


def test_a_mistake_leaves_no_folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with RunFolder(Config(), "world", resume=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_by_name_and_free_after_kill_9(tmp_path: Path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"another process is training in {folder}"):
            RunFolder(Config(run_dir=str(folder)), "world", resume=True)
        os.kill(holder.pid, signal.SIGKILL)
    finally:
        holder.kill()
        holder.communicate()
    with RunFolder(Config(run_dir=str(folder)), "world", resume=True) as again:
        again.open(Config(run_dir=str(folder)), 0)
        assert again.is_locked


def test_two_new_runs_into_one_named_folder(tmp_path: Path):
    """Both see that it is not there yet; the second one to write is refused, whenever it comes."""
    config = Config(run_dir=str(tmp_path / "run"))
    first, second = (RunFolder(config, "world", resume=False) for _ in range(2))
    first.open(config, 0)
    with pytest.raises(UserError, match="another process is training"):
        second.open(config, 0)
    first.close()
    with pytest.raises(UserError, match="is not empty; add --resume"):
        second.open(config, 0)


def test_a_finished_run_lets_go_of_its_folder(finished: Path):
    with RunFolder(Config(run_dir=str(finished)), "world", resume=True) as folder:
        assert not folder.is_locked or folder.path == finished


def test_storage_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with RunFolder(Config(run_dir=str(tmp_path / "run")), "world", resume=False) as folder:
        folder.open(Config(), 0)
        assert not folder.is_locked


def test_what_a_checkpoint_counts_on_is_on_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The order of calls: trajectories, metrics and configuration, and their names, then the checkpoint."""
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def named(path: object) -> str:
        return str(Path(str(path)).relative_to(tmp_path)) if str(path).startswith(str(tmp_path)) else ""

    def synced(descriptor: int) -> None:
        calls.append(("sync", named(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def put(source: object, target: object) -> None:
        calls.append(("rename", named(target)))
        replace(str(source), str(target))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", put)
    monkeypatch.setattr(os, "rename", put)
    assert run(tmp_path / "run", "--steps", "1") == 0
    checkpoint = calls.index(("rename", "run/checkpoints/step-000001"))
    before, after = calls[:checkpoint], calls[checkpoint:]
    for name in ("run/config.toml", "run/cost.toml", "run/metrics.jsonl", "run/trajectories", "run", "."):
        assert ("sync", name) in before, name
    trajectory = before.index(("rename", "run/trajectories/step-000001.jsonl"))
    assert before[trajectory - 1] == ("sync", "run/trajectories/.tmp-step-000001.jsonl")
    assert ("sync", "run/trajectories") in before[trajectory:]
    inside = [path for what, path in before if path.startswith("run/checkpoints/.tmp-step-000001/")]
    for name in (
        "model.safetensors",
        "trainer/state.safetensors",
        "progress.json",
        "manifest.json",
        "trainer",
    ):
        assert f"run/checkpoints/.tmp-step-000001/{name}" in inside, name
    assert after[1] == ("sync", "run/checkpoints")


def test_a_file_written_anew_is_whole_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "summary.json"
    durable.write_text(path, "first")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_text(path, "second")
    assert path.read_text() == "first"
