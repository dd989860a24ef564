"""Whole runs on several ranks: the same training, resumed on another number of ranks; a rank that dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mosaic_fast.config_io import parse_train_arguments
from mosaic_fast.train import train

from .launch import run, start

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

    # the same run goes on in one process, and on three ranks, from what two have saved
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"]
    code, out, err = run(3, "mosaic_fast.train", *OPTIONS, "--run-dir", str(folder), "--resume")
    assert code == 0, out + err
    assert json.loads((folder / "summary.json").read_text())["after"] == summary["after"]


def test_a_rank_that_dies_ends_the_job_in_seconds_with_one_message(tmp_path: Path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--steps", "500", "--run-dir", str(folder)]
    job = start(2, ["mosaic_fast.train", *options])
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "step-000002").exists():
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < deadline, "no second step"
            time.sleep(0.05)
        victim = max(children(job.pid))
        os.kill(victim, signal.SIGKILL)
        begun = time.monotonic()
        _, err = job.communicate(timeout=60)
        assert time.monotonic() - begun < 30
        assert job.returncode != 0
        said = re.findall(r"^error: .*$", err, re.MULTILINE)
        assert len(said) == 1, err
        assert f"(process {victim} on " in said[0]
        assert "is gone; the job ends" in said[0]
        assert "--resume" in said[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            job.kill()


def test_a_mistake_is_said_once_and_nothing_is_left(tmp_path: Path):
    folder = tmp_path / "run"
    options = [*OPTIONS, "--model.path", str(tmp_path / "nowhere"), "--run-dir", str(folder)]
    code, _, err = run(2, "mosaic_fast.train", *options)
    assert code != 0
    assert len(re.findall(r"^error: model\.path: there is no folder", err, re.MULTILINE)) == 1
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
