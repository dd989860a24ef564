"""Whole training runs over a real server: its log-probs, its staleness, and server or trainer killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.train import train
from mosaic_rollout.engine.sglang import SGLangEngine
from tests.rollout.sglang.serving import PATIENCE_S, PYTHON, script


@pytest.mark.parametrize(
    "more",
    [
        ("--engine.verify-weights",),
        ("--engine.weights", "tensor"),
        ("--engine.weights", "distributed"),
        ("--model.lora-rank", "4"),
    ],
    ids=["verified", "tensor", "distributed", "lora"],
)
def test_a_run_over_a_given_server_agrees_with_the_trainer(
    engine: SGLangEngine, tmp_path: Path, more: tuple[str, ...]
):
    """`engine.urls`: two steps of training; the trainer's log-probs are those of the server."""
    url = engine.lanes[0].url
    assert run(tmp_path / "run", "--engine.urls", url, "--steps", "2", *more) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for row in map(json.loads, lines):
        assert abs(row["mismatch/kl"]) < 1e-6
        assert row["mismatch/ratio_max"] < 1.001
        assert row["tree/engine_prefix_hit"] >= 0.97 * row["tree/engine_prefix_hit_ideal"]
    served = asyncio.run(weight_version(engine))
    assert served == "1"  # the rollouts of the second step came from the weights of the first update


def test_a_run_ahead_of_its_trainer_is_as_old_as_allowed(engine: SGLangEngine, tmp_path: Path):
    """`rollout.max_staleness = 1`, sampled from the server while the step before trains."""
    url = engine.lanes[0].url
    more = (
        "--rollout.max-staleness",
        "1",
        "--off-policy.truncate-at",
        "2",
        "--engine.weights",
        "distributed",
    )
    assert run(tmp_path / "run", "--engine.urls", url, "--steps", "4", *more) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy/staleness"] for row in rows] == [0, 1, 1, 1]
    assert abs(rows[0]["mismatch/kl"]) < 1e-6
    assert asyncio.run(weight_version(engine)) == "2"  # the rollouts of the last step


def test_a_run_survives_a_killed_server_and_stops_with_a_checkpoint_when_it_stays_away(tmp_path: Path):
    """Killed after the first step: the run goes on. Killed again, it never starts again."""
    starts = tmp_path / "starts"
    python = script(
        tmp_path, f'echo >> {starts}; [ $(wc -l < {starts}) -le 2 ] || exit 7; exec {PYTHON} "$@"'
    )
    folder = tmp_path / "run"
    more = ["--engine.python", str(python), "--steps", "60", "--checkpoint.every", "50"]
    command = [sys.executable, "-m", "mosaic_fast.train", *options(folder, *more)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for number in (1, 2):
            before = rows(folder)
            wait_until(lambda at_least=before + 1: rows(folder) >= at_least, run)
            [server] = [pid for pid in children(run.pid) if "launch.py" in command_line(pid)]
            os.killpg(server, signal.SIGKILL)
            assert rows(folder) >= number
        out, err = run.communicate(timeout=PATIENCE_S)
    finally:
        run.kill()
    assert run.returncode == 2, out + err
    assert "failed 3 times in a row" in err
    assert "server-0.log" in err
    assert "Traceback" not in err
    done = rows(folder)
    assert done >= 2
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert not (folder / "sglang" / "weights").exists()


def test_a_server_ends_with_a_trainer_that_is_killed(tmp_path: Path):
    """SIGKILL leaves a trainer no time to clean up: the server sees its pipe close."""
    code = (
        "import sys, asyncio; from pathlib import Path; from tests.rollout.sglang.serving import *\n"
        f"engine = make_engine(Policy.from_pretrained(EMBEDDED), Path({str(tmp_path)!r}))\n"
        "asyncio.run(engine.update_weights(1))"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    try:
        wait_until(lambda: any(len(group(pid)) >= 3 for pid in children(trainer.pid)), trainer)
        [server] = children(trainer.pid)
    finally:
        trainer.kill()
        trainer.wait()
    deadline = time.monotonic() + PATIENCE_S
    while group(server):
        assert time.monotonic() < deadline, f"left behind: {[command_line(pid) for pid in group(server)]}"
        time.sleep(0.1)


def rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def group(leader: int) -> list[int]:
    """Processes of a process group that are alive (a zombie is not)."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgid = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgid) == leader and state != "Z":
            members.append(int(path.parent.name))
    return members


async def weight_version(engine: SGLangEngine) -> str:
    version = await engine.lanes[0].client.weight_version(10.0)
    await engine.release()
    return version


def options(folder: Path, *more: str) -> list[str]:
    return [
        *("--engine.kind", "sglang", "--run-dir", str(folder), "--trackers.console", "plain"),
        *("--rollout.prompts-per-step", "4", "--env.eval-tasks", "0", *more),
    ]


def run(folder: Path, *more: str) -> int:
    config, resume, name = parse_train_arguments(options(folder, *more))
    return train(config, name, resume=resume)
