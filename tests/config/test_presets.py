"""Presets: what they fill in, what wins over them, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mosaic_fast.config import Config, ModelConfig, RolloutConfig
from mosaic_fast.config.presets import PRESETS, preset_in_words
from mosaic_fast.config.read import load_config, parse_train_command, save_config
from mosaic_fast.config.resume import flatten
from mosaic_fast.errors import UserError


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 32768}))
    return str(folder)


def parsed(*arguments: str) -> Config:
    return parse_train_command(list(arguments)).config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_resolved_and_what_is_given_wins(name: str, model: str, tmp_path: Path) -> None:
    config = parsed("--preset", name, "--model.path", model)
    values = flatten(config.model_dump())
    assert {key: values[key] for key in PRESETS[name].values} == PRESETS[name].values
    assert config.optim.lr == (1e-5 if config.model.lora_rank else 1e-6), "the kind of model goes on deciding"
    made = Config(preset=name, model=ModelConfig(path=model)).resolved()
    assert made.model_dump() == config.model_dump()
    file = tmp_path / "run.toml"
    file.write_text(f'preset = "{name}"\n[model]\npath = "{model}"\nlora_rank = 4\n')
    mine = parsed(str(file), "--rollout.max-rollout-tokens", "16000", "--rollout.max-step-tokens=100")
    assert (mine.model.lora_rank, mine.rollout.max_rollout_tokens, mine.rollout.max_step_tokens) == (
        4,
        16000,
        100,
    )
    assert mine.forest.tokens_per_microbatch == 16000, "a preset's limit gives way"
    assert f"model.lora_rank 4 (not its {PRESETS[name].values['model.lora_rank']})" in str(
        preset_in_words(mine)
    )
    save_config(mine, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml").model_dump() == mine.model_dump()


def test_a_preset_stays_within_the_models_positions(model: str) -> None:
    Path(model, "config.json").write_text(json.dumps({"max_position_embeddings": 1000}))
    config = Config(preset="laptop", model=ModelConfig(path=model))
    assert config.rollout.max_rollout_tokens == 1000
    both = Config(
        preset="laptop", model=ModelConfig(path=model), rollout=RolloutConfig(max_rollout_tokens=200)
    )
    assert (both.rollout.max_rollout_tokens, both.rollout.max_step_tokens) == (200, 200)


def test_a_preset_that_is_none_names_the_nearest(model: str) -> None:
    with pytest.raises(UserError, match=r"preset 'lora-24g': there is none .* did you mean 'lora-24gb'\?"):
        parsed("--preset", "lora-24g", "--model.path", model)
    with pytest.raises(UserError, match="there are laptop, lora-24gb, full-80gb"):
        parsed("--preset", "zzz", "--model.path", model)
    with pytest.raises(UserError, match="the embedded one needs none"):
        parsed("--preset", "laptop")
