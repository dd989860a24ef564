"""Whole runs on several ranks: one training on any number of them; a rank that dies or hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mosaic_fast.config.read import parse_train_arguments, parse_train_command
from mosaic_fast.distributed import World
from mosaic_fast.distributed.world import MISTAKE, run_as_rank
from mosaic_fast.sft import sft
from mosaic_fast.train import train
from tests.distributed.launch import PATIENCE_S, forked, log_of, run_forked, start

SILENCE_S = "10"

OPTIONS = [
    *(
        "--steps",
        "2",
        "--rollout.prompts-per-step",
        "3",
        "--rollout.group-size",
        "4",
        "--checkpoint.every",
        "1",
    ),
    *(
        "--env.eval-tasks",
        "3",
        "--model.threads",
        "1",
        "--model.device",
        "cpu",
        "--trackers.console",
        "plain",
    ),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    config, _, name = parse_train_arguments([*OPTIONS, "--run-dir", str(folder)])
    assert train(config, name) == 0
    return folder


def train_until_struck(folder: Path) -> list[str]:
    """Options of a run that only a signal ends."""
    return [*OPTIONS, "--steps", "500", "--env.eval-tasks", "0", "--run-dir", str(folder)]


def wait_for_a_step(folder: Path, running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not any(folder.glob("checkpoints/step-*")):
        assert running(), "ended before its first step"
        assert time.monotonic() < deadline, "no step"
        time.sleep(0.05)


def assert_one_message(said: str, rank: int, process: int, what: str) -> None:
    errors = re.findall(r"^error: .*$", said, re.MULTILINE)
    assert len(errors) == 1, said
    assert errors[0].startswith(f"error: rank {rank} (process {process} on ")
    assert f"{what}; the job ends" in errors[0]
    assert "--resume" in errors[0]


def test_a_rank_that_is_killed_ends_the_job_with_one_message(tmp_path: Path):
    """Under torchrun, which starts a run as users do."""
    job = start(2, ["mosaic_fast.train", *train_until_struck(tmp_path / "run")])
    try:
        wait_for_a_step(tmp_path / "run", lambda: job.poll() is None)
        victim = sorted(children(job.pid))[1]
        os.kill(victim, signal.SIGKILL)
        _, said = job.communicate(timeout=PATIENCE_S)
    finally:
        job.kill()
    assert job.returncode != 0
    assert_one_message(said, 1, victim, "is gone")


def test_a_rank_that_hangs_ends_the_job_with_one_message(tmp_path: Path):
    """In seconds on an idle machine; no such time is asked for here (test_silence.py has what saves 30 s)."""
    options = train_until_struck(tmp_path / "run")
    with forked(2, tmp_path, as_rank, options, MOSAIC_SILENCE_S=SILENCE_S) as ranks:
        wait_for_a_step(tmp_path / "run", lambda: all(one.is_alive() for one in ranks))
        hung, other = ranks
        assert hung.pid is not None
        os.kill(hung.pid, signal.SIGSTOP)
        other.join(PATIENCE_S)
        hung.join(PATIENCE_S)  # the one that noticed kills it
    assert other.exitcode not in (0, None)
    assert hung.exitcode == -signal.SIGKILL
    said = "".join(log_of(tmp_path, rank).read_text() for rank in range(2))
    assert_one_message(said, 0, hung.pid, f"has said nothing for {SILENCE_S} s")


def test_a_run_on_two_ranks_is_the_run_of_one(alone: Path, tmp_path: Path):
    folder = tmp_path / "two"
    ended = run_forked(2, tmp_path, as_rank, [*OPTIONS, "--run-dir", str(folder)])
    assert [code for code, _ in ended] == [0, 0], ended
    assert sum(log.count("run folder") for _, log in ended) == 1  # one rank speaks
    theirs, ours = (tokens(path) for path in (alone, folder))
    assert ours == theirs  # every rollout, whichever rank played it
    for expected, row in zip(metrics(alone), metrics(folder), strict=True):
        for key, value in expected.items():
            if not key.startswith(("time/", "perf/", "tree/", "judge/latency")):
                assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    last = "checkpoints/step-000002/model.safetensors"
    for name, weight in load_file(alone / last).items():
        np.testing.assert_allclose(load_file(folder / last)[name], weight, atol=1e-4, err_msg=name)

    # the same run goes on on three ranks, from what two have saved
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"]
    options = [*OPTIONS, "--run-dir", str(folder), "--resume"]
    ended = run_forked(3, tmp_path, as_rank, options)
    assert [code for code, _ in ended] == [0, 0, 0], ended
    assert json.loads((folder / "summary.json").read_text())["after"] == summary["after"]


def as_rank(options: list[str]) -> int:
    """What the command line does on each rank."""
    config, resume, name = parse_train_arguments(options)
    return run_as_rank(lambda world: train(config, name, resume=resume, world=world))


def as_cold_rank(options: list[str]) -> int:
    """A rank of a cold start."""

    def main(world: World) -> int:
        command = parse_train_command(options, "mosaic_fast.sft")
        return sft(command.config, command.name, resume=command.resume, world=world)

    return run_as_rank(main)


def test_a_cold_start_on_two_ranks_is_that_of_one(tmp_path: Path):
    cold = [*OPTIONS, "--sft.demonstrations", "6", "--sft.per-step", "3", "--env.eval-tasks", "0"]
    command = parse_train_command([*cold, "--run-dir", str(tmp_path / "one")], "mosaic_fast.sft")
    assert sft(command.config, command.name) == 0
    ended = run_forked(2, tmp_path, as_cold_rank, [*cold, "--run-dir", str(tmp_path / "two")])
    assert [code for code, _ in ended] == [0, 0], ended
    for expected, row in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert row["policy/nll"] == pytest.approx(expected["policy/nll"], rel=1e-4)
        assert row["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=1e-3)
    (tmp_path / "talks.jsonl").write_text("{}")
    wrong = [*cold, "--sft.conversations", str(tmp_path / "talks.jsonl"), "--run-dir", str(tmp_path / "none")]
    ended = run_forked(2, tmp_path, as_cold_rank, wrong)
    assert [code for code, _ in ended] == [MISTAKE, MISTAKE], ended
    said = "".join(log for _, log in ended)
    assert (
        len(re.findall(r"^error: .*talks\.jsonl, line 1: a conversation is an object", said, re.MULTILINE))
        == 1
    )
    assert not (tmp_path / "none").exists()


def test_a_mistake_is_said_once_and_nothing_is_left(tmp_path: Path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--model.path", str(tmp_path / "nowhere"), "--run-dir", str(folder)]
    ended = run_forked(2, tmp_path, as_rank, options)
    assert [code for code, _ in ended] == [MISTAKE, MISTAKE], ended
    said = "".join(log for _, log in ended)
    assert len(re.findall(r"^error: model\.path: there is no folder", said, re.MULTILINE)) == 1
    assert "Traceback" not in said
    assert not folder.exists()


def children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(one) for one in path.read_text().split()]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tokens(folder: Path) -> list[list[int]]:
    rows = [
        json.loads(line)
        for path in sorted((folder / "trajectories").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [row["token_ids"] for row in rows]
