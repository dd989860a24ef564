"""A training run that is judged over HTTP: what it leaves on disk, and that its key is nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.report.collect import collect_run
from mosaic_fast.train import train
from tests.preferences.endpoint import Json, endpoint, shown

KEY = "sk-very-secret"


def refusals_win(request: Json) -> Json:
    data = shown(request)
    first, second = (str(data[name]).count("refusal") for name in ("trajectory_1", "trajectory_2"))
    winner = "1" if first > second else "2" if first < second else "tie"
    return {"reason": f"{first} refusals against {second}", "winner": winner}


def test_a_run_judged_by_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    run = tmp_path / "run"
    with endpoint(refusals_win) as served:
        arguments = ["--judge.name", "llm", "--judge.endpoint", served.url, "--judge.model", "m"]
        arguments += ["--judge.api-key-env", "JUDGE_KEY", "--run-dir", str(run), "--steps", "1"]
        arguments += ["--rollout.prompts-per-step", "3", "--env.eval-tasks", "0"]
        arguments += ["--trackers.console", "quiet"]
        config, resume, name = parse_train_arguments(arguments)
        assert train(config, name, resume=resume) == 0
    (metrics,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert metrics["judge/calls"] == len(served.requests) - 1 > 0, "the first question is no step's"
    assert metrics["judge/flip_rate"] == 0
    assert metrics["judge/intransitive_frac"] == 0
    rows = [json.loads(line) for line in (run / "trajectories" / "step-000001.jsonl").open()]
    assert len(rows) == 12
    for row in rows:
        for p, reason in zip(row["preferences"], row["reasons"], strict=True):
            assert p == 0.5 or "refusals against" in reason
    assert served.keys[0] == f"Bearer {KEY}"
    assert not [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert collect_run(run, 100).notes == []
    kept = json.loads((run / "judge.json").read_text())
    assert kept["asked_with"] == {"temperature": 0.0, "max_tokens": 1024, "response_format": "json_schema"}
    assert json.loads((run / "summary.json").read_text())["judge"] == kept
