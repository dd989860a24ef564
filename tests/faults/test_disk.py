"""A disk that is full, read-only or that changed what it was given: named, and nothing else is harmed."""

from __future__ import annotations

import ctypes
import hashlib
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from mosaic_fast.checkpoint import latest_checkpoint, verify_checkpoint
from mosaic_fast.config_io import run_cli
from mosaic_fast.errors import TrainingError
from mosaic_fast.soak.compare import differences

from .conftest import OPTIONS, run


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(folder: Path, before: Callable[[], None], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mosaic_fast.train", *OPTIONS, "--run-dir", str(folder), *more]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=before, timeout=120
    )


def no_file_above(size: int) -> Callable[[], None]:
    """Writes above `size` bytes fail as they do on a full disk, at the same place in every run."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def no_override() -> None:
    """Permissions hold for root, too: its right to pass over them does not survive the exec."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE


@pytest.mark.parametrize(
    ("size", "unwritten"),
    [(4_000, "the trajectories")],
)
def test_a_full_disk_is_named_wherever_it_is_met(tmp_path: Path, size: int, unwritten: str):
    folder = tmp_path / "run"
    ended = start(folder, no_file_above(size))
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert f"{unwritten} cannot be written" in ended.stderr
    assert "make room" in ended.stderr
    assert "--resume" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert latest_checkpoint(folder / "checkpoints") is None


def test_a_run_whose_disk_was_full_goes_on_to_the_same_bits(finished: Path, tmp_path: Path):
    folder = tmp_path / "run"
    assert start(folder, no_file_above(1_000_000)).returncode == 2
    assert run(folder, "--resume") == 0
    assert differences(folder, finished) == []


def test_a_read_only_folder_is_named_and_left_as_it_is(finished: Path, tmp_path: Path):
    """As a place for a new run, and with a run to resume in it."""
    for folder in (tmp_path / "empty", tmp_path / "run"):
        if folder.name == "run":
            shutil.copytree(finished, folder)
        else:
            folder.mkdir()
        before = contents(folder)
        inner = [path for path in folder.rglob("*") if path.is_dir()]
        for path in (folder, *inner):
            path.chmod(0o555)
        try:
            ended = start(folder, no_override, *(["--resume"] if folder.name == "run" else []))
        finally:
            for path in (folder, *inner):
                path.chmod(0o755)
        assert ended.returncode == 2, ended.stderr
        assert "cannot be written" in ended.stderr
        assert "Permission denied" in ended.stderr
        assert "make it writable" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert contents(folder) == before


def test_every_file_of_a_checkpoint_is_guarded(finished: Path, tmp_path: Path):
    """Each file in turn cut short, emptied, removed and with one bit flipped: that checkpoint is refused."""
    random, tried = Random(0), 0
    (tmp_path / "checkpoints").mkdir()
    for step in (1, 2):
        name = f"checkpoints/step-{step:06d}"
        shutil.copytree(finished / name, tmp_path / name)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    verify_checkpoint(checkpoint)
    for path in sorted(checkpoint.rglob("*")):
        sound = path.read_bytes()
        bit = random.randrange(8 * len(sound))
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        for damaged in (sound[: len(sound) // 2], sound[:-1], b"", bytes(flipped), None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(TrainingError, match=r"step-000002 is corrupt.* resume from step-000001"):
                verify_checkpoint(checkpoint)
            tried += 1
        path.write_bytes(sound)
    verify_checkpoint(checkpoint)
    assert tried >= 35


def test_a_damaged_checkpoint_stops_a_resume_and_the_one_before_it_serves(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    weights = folder / "checkpoints" / "step-000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = contents(folder)
    assert run_cli(lambda: run(folder, "--resume")) == 2
    said = capsys.readouterr().err
    assert "model.safetensors" in said
    assert "move that folder away to resume from step-000001" in said
    assert contents(folder) == before
    shutil.move(weights.parent, tmp_path / "away")
    assert run(folder, "--resume") == 0
    assert differences(folder, finished) == []


def test_what_is_not_named_as_a_checkpoint_is_none(tmp_path: Path):
    """A checkpoint renamed in place, a copy, a file: not resumed from, nor advised."""
    assert latest_checkpoint(tmp_path / "absent") is None
    for name in (
        "step-000002-old",
        "step-000003.bak",
        "step-4",
        "step-00000\u0665",
        "my-step-000006",
        ".tmp-step-000007",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000008").write_text("a file")
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "step-000001").mkdir()
    with pytest.raises(TrainingError, match="there is no other one"):
        verify_checkpoint(tmp_path / "step-000001")
    (tmp_path / "step-999999").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-999999"
    (tmp_path / "step-1000000").mkdir()  # the number counts, not the order of the letters
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"


def test_a_damaged_metrics_file_costs_the_damaged_rows_only(finished: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    metrics = folder / "metrics.jsonl"
    first, second = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"\xff\x00 broken\n" + first + b"[1, 2]\n" + second + second[:20])
    assert run(folder, "--resume") == 0
    assert metrics.read_bytes() == first + second
