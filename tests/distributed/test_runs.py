"""Whole runs on several ranks: one training on any number of them; a rank that dies or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.distributed.world import MISTAKE, run_as_rank
from mosaic_fast.train import train
from tests.distributed.launch import PATIENCE_S, run, run_forked, start

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


@dataclass
class Doomed:
    """A job of two ranks; once it trains, one of them is sent a signal."""

    signal: signal.Signals
    rank: int
    job: subprocess.Popen[str]
    folder: Path
    victim: int = 0  # the rank's process

    def strike(self) -> bool:
        """Whether the signal is sent; it is not before the first step has ended."""
        if not self.victim and any(self.folder.glob("checkpoints/step-*")):
            self.victim = sorted(children(self.job.pid))[self.rank]
            os.kill(self.victim, self.signal)
        assert self.victim or self.job.poll() is None, self.job.communicate()
        return bool(self.victim)


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Doomed]]:
    """Both jobs at once: much of their time they wait."""
    jobs = {}
    for name, kind, rank in (("killed", signal.SIGKILL, 1), ("stopped", signal.SIGSTOP, 0)):
        folder = tmp_path_factory.mktemp(name) / "run"
        options = [*OPTIONS, "--steps", "500", "--env.eval-tasks", "0", "--run-dir", str(folder)]
        job = start(2, ["mosaic_fast.train", *options], MOSAIC_SILENCE_S=SILENCE_S)
        jobs[name] = Doomed(kind, rank, job, folder)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not all(one.strike() for one in jobs.values()):
            assert time.monotonic() < deadline, "no step"
            time.sleep(0.05)
        yield jobs
    finally:
        for one in jobs.values():
            with contextlib.suppress(ProcessLookupError):
                one.job.kill()


@pytest.mark.parametrize(
    ("name", "what"), [("killed", "is gone"), ("stopped", f"has said nothing for {SILENCE_S} s")]
)
def test_a_rank_that_dies_or_hangs_ends_the_job_with_one_message(
    doomed: dict[str, Doomed], name: str, what: str
):
    """In seconds on an idle machine; no such time is asked for here (test_silence.py has what saves 30 s)."""
    one = doomed[name]
    _, err = one.job.communicate(timeout=PATIENCE_S)
    assert one.job.returncode != 0
    said = re.findall(r"^error: .*$", err, re.MULTILINE)
    assert len(said) == 1, err
    assert said[0].startswith(f"error: rank {one.rank} (process {one.victim} on ")
    assert f"{what}; the job ends" in said[0]
    assert "--resume" in said[0]
    assert not Path(f"/proc/{one.victim}").exists()


def test_a_run_on_two_ranks_is_the_run_of_one(alone: Path, tmp_path: Path):
    folder = tmp_path / "two"
    code, out, err = run(2, "mosaic_fast.train", *OPTIONS, "--run-dir", str(folder))
    assert code == 0, out + err
    assert out.count("run folder") == 1  # one rank speaks
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
