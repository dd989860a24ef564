"""What the soak command goes by: what a run is doing, and in what two runs differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from tools.soak.campaign import differences
from tools.soak.victim import State, draw_aim, state_of


def test_what_a_run_is_doing_is_read_from_its_files(tmp_path: Path):
    def state() -> State:
        return state_of(tmp_path / "run", 2, opened=True)

    assert state_of(tmp_path / "run", 2, opened=False) == State("start-up", 0)
    for name in ("checkpoints", "trajectories"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert state() == State("rollout", 0)
    (tmp_path / "run" / "trajectories" / ".tmp-step-000001.jsonl").touch()
    assert state() == State("rollout", 0)
    (tmp_path / "run" / "trajectories" / "step-000001.jsonl").touch()
    assert state() == State("update", 0)
    unfinished = tmp_path / "run" / "checkpoints" / ".tmp-step-000001"
    unfinished.mkdir()
    assert state() == State("checkpoint", 0)
    unfinished.rename(unfinished.with_name("step-000001"))
    assert state() == State("rollout", 1)
    (tmp_path / "run" / "checkpoints" / "step-000002").mkdir()
    assert state() == State("finish", 2)


def test_every_phase_is_aimed_at():
    random = Random(0)
    assert {draw_aim(random, 5).phase for _ in range(100)} == {
        "life",
        "start-up",
        "rollout",
        "update",
        "checkpoint",
    }
    assert {draw_aim(random, 0).phase for _ in range(100)} == {"life", "start-up", "finish"}


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("checkpoints/step-000002/model.safetensors", "checkpoint step-000002: model.safetensors"),
        ("trajectories/step-000001.jsonl", "trajectories step-000001.jsonl"),
        ("metrics.jsonl", "metrics of step"),
        ("summary.json", "summary: steps"),
        (".tmp-left", "left over: .tmp-left"),
    ],
)
def test_a_difference_is_found(finished: Path, tmp_path: Path, name: str, difference: str):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    assert differences(folder, finished) == []
    path = folder / name
    if name == "summary.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 3}))
    elif name == "metrics.jsonl":
        path.write_text(path.read_text().replace('"reward/total": ', '"reward/total": 1'))
    elif path.exists():
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
    else:
        path.touch()
    found = differences(folder, finished)
    assert found
    assert found[0].startswith(difference)
