"""A disk that is full, read-only or that changed what it was given: named, and nothing else is harmed."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from mosaic_fast.cli import run_cli
from mosaic_fast.errors import TrainingError
from mosaic_fast.learner.checkpoint import latest_checkpoint, verify_checkpoint
from tests.faults.conftest import run
from tools.soak.campaign import differences


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writes above `size` bytes fail as they do on a full disk, at the same place in every run.

    Python ignores the signal that would come with it.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_override() -> Iterator[None]:
    """Permissions hold for root, too: this thread and those it starts do without CAP_DAC_OVERRIDE, bit 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and the same of the upper 32 bits
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] &= ~(1 << 1)
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


def test_a_full_disk_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    with no_file_above(4_000):
        assert run_cli(lambda: run(folder)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "the trajectories cannot be written" in said
    assert "make room" in said
    assert "--resume" in said
    assert latest_checkpoint(folder / "checkpoints") is None


def test_a_run_whose_disk_was_full_goes_on_to_the_same_bits(finished: Path, tmp_path: Path):
    """Full at a checkpoint."""
    folder = tmp_path / "run"
    with no_file_above(1_000_000):
        assert run_cli(lambda: run(folder)) == 2
    assert (folder / "trajectories" / "step-000001.jsonl").exists()
    assert run(folder, "--resume") == 0
    assert differences(folder, finished) == []


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["a new run", "one to resume"])
def test_a_read_only_folder_is_named_and_left_as_it_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
):
    folder = tmp_path / "run"
    if options:
        shutil.copytree(finished, folder)
    else:
        folder.mkdir()
    before = contents(folder)
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        with no_override():
            assert run_cli(lambda: run(folder, *options)) == 2
    finally:
        for path in folders:
            path.chmod(0o755)
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert "Permission denied" in said
    assert "make it writable" in said
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
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
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
