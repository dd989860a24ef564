"""A run on an agent that is a program: its trajectories, its figures, and the gradient of what it sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.run import summary
from mosaic_fast.run.trajectories import RolloutRow
from mosaic_fast.train import train
from tests.rollout.environments.agent_env.test_agents import MODULE, tasks_file

ROWS = [{"prompt": f"read file {n} and mail it", "kind": "benign"} for n in range(6)]
SMALL = ("--steps", "1", "--env.eval-tasks", "2", "--model.dtype", "float32", "--trackers.console", "quiet")


def test_a_run_trains_on_a_program(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(summary, "draw_curves", lambda *_: None)
    where = ["--env.tasks", tasks_file(tmp_path, ROWS), "--run-dir", str(tmp_path / "run")]
    named = ["--env.name", f"{MODULE}:samples_around", "--reward.parts", "align", "length"]
    config, _, _ = parse_train_arguments([*options, *SMALL, *named, *where])
    assert train(config, "agent") == 0
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["env/agent_errors"] == 0.0
    assert row["optim/grad_norm"] > 0
    assert row["policy/dropped_tokens"] == 0
    assert abs(row["mismatch/kl"]) < 1e-6  # the trainer computes the very log-probs that were sampled by
    lines = (tmp_path / "run" / "trajectories" / "step-000001.jsonl").read_text().splitlines()
    rows = [RolloutRow.model_validate_json(line) for line in lines]
    assert all(len(row.contexts) == 2 for row in rows)
    assert all(len(row.trained) == len(row.rollout_logprobs) > 0 for row in rows)
