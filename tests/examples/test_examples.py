"""Every file in examples/ trains a step, and does what it says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.my_reward import ranks
from mosaic_fast.config.read import parse_train_arguments, parse_train_command
from mosaic_fast.run import summary
from mosaic_fast.sft import sft
from mosaic_fast.train import train
from tests.rollout.families_for_tests import FAMILIES

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWN = {
    "my_loss.py": "loss/bounded_frac",
    "my_reward.py": "reward/checks",
    "my_judge.py": "judge/harmed",
    "my_environment.py": "rollout/steps_mean",
    "own_model.toml": "tree/unique_tokens",
}
"""A metric that the example is to be seen by."""


def command_of(text: str) -> list[str]:
    """The options of the command in an example's head."""
    lines = text.replace("\\\n", " ").splitlines()
    line = next(line for line in lines if "python -m mosaic_fast.train" in line)
    return shlex.split(line.partition("mosaic_fast.train")[2])


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_trains_by_the_command_in_its_head(
    name: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(summary, "draw_curves", lambda *_: None)
    monkeypatch.chdir(EXAMPLES.parent)
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    small = ["--steps", "1", "--rollout.max-steps", "2", "--env.eval-tasks", "0", "--model.dtype", "float32"]
    arguments = [*command_of(text), *options, *small, "--run-dir", str(tmp_path / "run")]
    config, _, run = parse_train_arguments(arguments)
    assert train(config, run) == 0
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert SHOWN[name] in row


def test_a_cold_start_learns_from_the_file_and_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a tokenizer that can write every text: that of the other tests knows the world's words only."""
    coder = FAMILIES["qwen2.5"].tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(coder), num_key_value_heads=1, head_dim=8, **shape)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    coder.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(summary, "draw_curves", lambda *_: None)
    monkeypatch.chdir(EXAMPLES.parent)
    small = ["--steps", "1", "--env.eval-tasks", "0", "--model.dtype", "float32", "--sft.per-step", "4"]
    small += ["--model.path", str(tmp_path / "model"), "--trackers.console", "quiet"]
    arguments = ["examples/cold_start.toml", *small, "--run-dir", str(tmp_path / "run")]
    command = parse_train_command(arguments, "mosaic_fast.sft")
    assert (command.config.optim.epochs, command.config.optim.lr) == (1, 1e-5)
    assert sft(command.config, command.name) == 0
    assert json.loads((tmp_path / "run" / "sft.json").read_text())["conversations"] == 2 + 4


def test_there_is_one_example_of_everything():
    elsewhere = {"share_in_trl.py", "share_in_trainer.py", "my_agent.py"}  # run where what they need is
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {
        *SHOWN,
        "my_tasks.jsonl",
        *("cold_start.toml", "my_conversations.jsonl"),
        *elsewhere,
    }


def test_ranks_are_a_pure_order():
    assert ranks(np.array([3.0, 1.0, 1.0, 9.0]), []).tolist() == pytest.approx([1 / 3, -2 / 3, -2 / 3, 1.0])
