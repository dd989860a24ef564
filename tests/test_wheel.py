"""What is built and installed works by itself: without a checkout, in an empty folder, without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with our wheel and, but for Triton, the packages of others here."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    venv.create(folder / "venv")
    found = folder / "venv" / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(found),
        *["install", "-q", "--no-deps", "--no-index"],
    ]
    subprocess.run([*install, str(folder / done.stdout.split()[-1])], check=True, capture_output=True)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    # Behind our wheel. The editable install of the checkout is a .pth file there, which is not followed.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    (site / "sitecustomize.py").write_text('import sys\nsys.modules["triton"] = None\n')
    return found


def run(python: Path, folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_is_imported_from_the_wheel_and_holds_no_workshop(python: Path, tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as util; import mosaic_fast, mosaic_kernels, mosaic_rollout; "
        "print(mosaic_fast.__file__, mosaic_kernels.__file__, mosaic_rollout.__file__); "
        "print([n for n in ('tests', 'tools', 'bench') if util.find_spec(n)], 'torch' in sys.modules)"
    )
    files, there = run(python, tmp_path, "-c", code).splitlines()
    assert all(str(python.parents[1]) in file for file in files.split())
    assert there == "[] False"


def test_it_trains(python: Path, tmp_path: Path) -> None:
    small = [
        "--steps",
        "2",
        "--rollout.prompts-per-step",
        "1",
        "--rollout.group-size",
        "2",
        "--env.eval-tasks",
        "0",
    ]
    where = ["--run-dir", "here", "--trackers.console", "quiet"]
    run(python, tmp_path, "-m", "mosaic_fast.train", *small, *where)
    assert (tmp_path / "here" / "checkpoints" / "step-000002" / "model.safetensors").is_file()


def test_it_verifies_the_kernels(python: Path, tmp_path: Path) -> None:
    printed = run(python, tmp_path, "-m", "mosaic_kernels.verify", "--forests", "1")
    assert "== references: ok" in printed
    assert "== device: " in printed  # not run, where there is no CUDA device
