"""Tasks whose prompt alone is too long: their rollouts have no turn, and nothing that reads them minds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mosaic_fast.config.config import derived_seed
from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.learner.checkpoint import latest_checkpoint
from mosaic_fast.report.collect import collect_run
from mosaic_fast.report.page import render_page
from mosaic_fast.run import summary
from mosaic_fast.setup.model_folder import load_tokenizer, model_folder
from mosaic_fast.train import train
from mosaic_rollout.chat import Chat
from mosaic_rollout.chat.grammar import REFUSAL_SCHEMA
from mosaic_rollout.environments.world.environment import WorldEnvironment
from tests.run.test_run import learned

_VARIANTS = {
    "grpo": [],
    "dpo": ["--loss.name", "dpo"],
    "forked at a step": ["--rollout.branching", "fork_at_step", "--forest.credit", "subtree"],
    "gates contrasted": [
        *("--rollout.branching", "fork_at_check", "--rollout.gate-contrast", "--loss.name", "dapo"),
    ],
}


@pytest.fixture(scope="module")
def prompt_lengths() -> list[int]:
    """Prompt tokens of the tasks of the first step, the shortest first."""
    chat, environment = Chat(load_tokenizer(model_folder("embedded")), teach_loop=False), WorldEnvironment()
    tasks = environment.sample("train", 4, derived_seed(0, "tasks", 0))
    episodes = [environment.reset(task) for task in tasks]
    return sorted(len(chat.prompt(e.messages, [*e.tools, REFUSAL_SCHEMA])[0]) for e in episodes)


@pytest.mark.parametrize("all_of_them", [False, True], ids=["some", "all"])
@pytest.mark.parametrize("variant", _VARIANTS)
def test_a_run_goes_on_where_rollouts_have_no_turn(
    prompt_lengths: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    all_of_them: bool,
):
    monkeypatch.setattr(summary, "draw_curves", lambda *_: None)
    assert prompt_lengths[0] < prompt_lengths[-1]
    longest = prompt_lengths[0] - 1 if all_of_them else prompt_lengths[-1] - 1
    options = [
        *("--steps", "1", "--env.eval-tasks", "4", "--rollout.prompts-per-step", "4"),
        *("--rollout.max-step-tokens", "8", "--rollout.max-rollout-tokens", str(longest)),
        *("--trackers.console", "plain", "--run-dir", str(tmp_path / "run"), *_VARIANTS[variant]),
    ]
    config, _, name = parse_train_arguments(options)
    assert train(config, name) == 0
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is not None
    (row,) = learned(tmp_path / "run")
    assert np.isfinite(list(row.values())).all()
    assert row["policy/staleness"] == 0.0
    rollouts = [
        json.loads(line)
        for line in (tmp_path / "run/trajectories/step-000001.jsonl").read_text().splitlines()
    ]
    without = [rollout for rollout in rollouts if not rollout["steps"]]
    assert without
    assert (len(without) == len(rollouts)) == all_of_them
    assert all(r["status"] == "truncated" and not r["trained"] for r in without)
    assert "<html" in render_page([collect_run(tmp_path / "run", 100)])
