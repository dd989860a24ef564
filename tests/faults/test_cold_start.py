"""A cold start that is killed in the middle, and one that is asked to stop, go on as if nothing had been."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

from mosaic_fast.config.read import parse_train_command
from mosaic_fast.sft import sft
from tests.run.test_run import assert_same_run, start, wait_for

STEPS = 6
OPTIONS = [
    *("--sft.demonstrations", "24", "--sft.per-step", "8", "--steps", str(STEPS), "--model.device", "cpu"),
    *("--env.eval-tasks", "3", "--trackers.console", "quiet"),
]


def run(folder: Path, *more: str) -> int:
    command = parse_train_command([*OPTIONS, "--run-dir", str(folder), *more], "mosaic_fast.sft")
    return sft(command.config, command.name, resume=command.resume)


def test_killed_and_interrupted_is_uninterrupted(tmp_path: Path):
    """kill -9, resumed, Ctrl-C, resumed: the same bits as the cold start that nothing stopped."""
    assert run(tmp_path / "undisturbed") == 0
    folder = tmp_path / "run"
    killed = start(OPTIONS, folder, module="mosaic_fast.sft")
    wait_for(folder / "checkpoints" / "step-000001", killed)
    killed.kill()
    killed.communicate()
    assert not (folder / "summary.json").exists()
    stopped = start(OPTIONS, folder, "--resume", module="mosaic_fast.sft")
    wait_for(folder / "checkpoints" / "step-000003", stopped)
    with contextlib.suppress(ProcessLookupError):
        stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=600)
    assert stopped.returncode in (0, 130), errors  # the last steps may be over before it arrives
    assert "Traceback" not in errors
    assert run(folder, "--resume") == 0
    assert_same_run(tmp_path / "undisturbed", folder, STEPS)
