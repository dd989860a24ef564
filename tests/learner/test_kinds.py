"""Defaults by the kind of model: never silently those of the embedded one, and what is given always wins."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_fast.config import (
    Config,
    ForestConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
)
from mosaic_fast.config.kinds import KEYS, OTHER_MODELS, RECORD, defaults_in_words, record_of
from mosaic_fast.config.read import load_config, parse_train_arguments, save_config
from mosaic_fast.errors import UserError
from mosaic_fast.setup.model_folder import model_folder

EMBEDDED = {
    "rollout.max_steps": 6,
    "rollout.max_step_tokens": 72,
    "rollout.max_rollout_tokens": 512,
    "rollout.teach_loop": False,
    "reward.length_target": 40.0,
    "optim.lr": 5e-4,
    "optim.epochs": 2,
    "forest.tokens_per_microbatch": 8192,
}


def values_of(config: Config) -> dict[str, object]:
    return {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in KEYS}


def parsed(*arguments: str) -> Config:
    return parse_train_arguments(arguments)[0]


def described(folder: Path, positions: int | None = 40_960) -> str:
    """A folder as far as the configuration looks at it."""
    folder.mkdir(exist_ok=True)
    known = {} if positions is None else {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **known}))
    return str(folder)


def flag(key: str, value: object) -> list[str]:
    section, name = key.split(".")
    if isinstance(value, bool):
        return [f"--{section}.{'' if value else 'no-'}{name.replace('_', '-')}"]
    return [f"--{key.replace('_', '-')}", str(value)]


def test_the_embedded_model_has_the_sections_own_defaults():
    own = str(model_folder("embedded"))
    for config in (Config(), parsed("--model.path", own), Config(model=ModelConfig(path=own))):
        assert values_of(config) == EMBEDDED
        assert defaults_in_words(config) is None
    assert values_of(parsed("--model.lora-rank", "4")) == EMBEDDED


@pytest.mark.parametrize("adapters", [False, True])
def test_no_default_of_the_embedded_model_reaches_another(tmp_path: Path, adapters: bool):
    path, rank = described(tmp_path / "qwen"), 8 if adapters else 0
    (tmp_path / "run.toml").write_text(f"[model]\npath = {json.dumps(path)}\nlora_rank = {rank}\n")
    expected = {**OTHER_MODELS, **({"optim.lr": 1e-5} if adapters else {})}
    alike = {key for key in KEYS if expected[key] == EMBEDDED[key]}
    assert alike == {"forest.tokens_per_microbatch"}
    for config in (
        parsed(str(tmp_path / "run.toml")),
        load_config(tmp_path / "run.toml"),
        Config(model=ModelConfig(path=path, lora_rank=rank)),
        Config(model=ModelConfig(path=path, lora_rank=rank), rollout=RolloutConfig(group_size=2)),
    ):
        assert values_of(config) == expected
        told = defaults_in_words(config) or ""
        assert all(key in told for key in KEYS)


@pytest.mark.parametrize("key", [key for key in KEYS if key != "forest.tokens_per_microbatch"])
@pytest.mark.parametrize("value_of", ["embedded", "other"])
def test_what_is_given_wins_even_where_it_is_a_default_of_a_kind(tmp_path: Path, key: str, value_of: str):
    """On the command line, in a file, and in an object."""
    path = described(tmp_path / "qwen")
    value = (EMBEDDED if value_of == "embedded" else OTHER_MODELS)[key]
    section, name = key.split(".")
    written = f"[model]\npath = {json.dumps(path)}\n[{section}]\n{name} = {json.dumps(value)}\n"
    (tmp_path / "run.toml").write_text(written)
    (tmp_path / "given.toml").write_text(f"[{section}]\n{name} = {json.dumps(value)}\n")
    classes = {"rollout": RolloutConfig, "reward": RewardConfig, "optim": OptimConfig}
    for config in (
        parsed("--model.path", path, *flag(key, value)),
        load_config(tmp_path / "run.toml"),
        load_config(tmp_path / "given.toml", model=path),
        Config.model_validate({"model": {"path": path}, section: {name: value}}),
        Config.model_validate(
            {"model": ModelConfig(path=path), section: classes[section].model_validate({name: value})}
        ),
    ):
        assert values_of(config)[key] == value
        others = set(KEYS) - {key, "rollout.max_step_tokens"}
        assert {k: values_of(config)[k] for k in others} == {k: OTHER_MODELS[k] for k in others}


limits = st.one_of(st.none(), st.integers(1, 40_000))


@settings(max_examples=60)
@given(limits, limits, limits, st.integers(64, 40_000))
def test_defaults_give_way_to_given_limits_and_to_the_model(
    tmp_path_factory: pytest.TempPathFactory,
    rollout: int | None,
    turn: int | None,
    batch: int | None,
    positions: int,
):
    """Whatever part of the limits is given: what contradicts itself is what was given, never a default."""
    path = described(tmp_path_factory.getbasetemp() / "drawn", positions)
    contradicts = (
        (turn or 1) > min(rollout or positions, batch or positions, 8192 if rollout is None else rollout)
        or (rollout or 1) > (batch or 40_000)
    )  # fmt: skip
    given_values = {
        "model": {"path": path},
        "rollout": {k: v for k, v in (("max_rollout_tokens", rollout), ("max_step_tokens", turn)) if v},
        "forest": {} if batch is None else {"tokens_per_microbatch": batch},
    }
    if contradicts:
        return
    config = Config.model_validate(given_values)
    longest = config.rollout.max_rollout_tokens
    assert longest == (rollout or min(8192, positions, batch or 8192))
    assert config.rollout.max_step_tokens == (turn or min(1024, longest))
    assert config.forest.tokens_per_microbatch == (batch or max(8192, longest))


def test_a_checkpoint_goes_on_as_it_was_trained(tmp_path: Path):
    path = described(tmp_path / "step-000060", 1024)
    run = Config(rollout=RolloutConfig(max_step_tokens=90), optim=OptimConfig(lr=3e-4))
    (tmp_path / "step-000060" / RECORD).write_text(record_of(run))
    assert values_of(parsed("--model.path", path)) == values_of(run)
    assert parsed("--model.path", path, "--rollout.teach-loop").rollout.teach_loop
    adapters = parsed("--model.path", path, "--model.lora-rank", "4")
    assert (adapters.optim.lr, adapters.optim.epochs) == (1e-5, 1), "another way of training"
    assert adapters.rollout.max_step_tokens == 90
    assert "trained here" in (defaults_in_words(adapters) or "")


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"adapters": false, "optim.lr": "much"}', "\xff"])
def test_a_record_that_is_none_is_named(tmp_path: Path, text: str):
    path = described(tmp_path / "model")
    (tmp_path / "model" / RECORD).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"model\.path: .*{RECORD}.*remove it"):
        parsed("--model.path", path)


@pytest.mark.parametrize("config_json", ["", "[]", '{"max_position_embeddings": -1}', None])
def test_a_folder_that_says_nothing_of_its_positions(tmp_path: Path, config_json: str | None):
    (tmp_path / "model").mkdir()
    if config_json is not None:
        (tmp_path / "model" / "config.json").write_text(config_json)
    assert values_of(parsed("--model.path", str(tmp_path / "model"))) == dict(OTHER_MODELS)


def test_a_run_folder_has_them_written_out_and_a_resume_reads_them_there(tmp_path: Path):
    """Though the folder of the model has changed meanwhile, or is gone."""
    path = described(tmp_path / "model", 2048)
    config = parsed("--model.path", path, "--optim.lr", "0.002")
    run = tmp_path / "run"
    run.mkdir()
    save_config(config, run / "config.toml")
    written = tomllib.loads((run / "config.toml").read_text())
    assert written["rollout"]["max_rollout_tokens"] == 2048
    assert written["optim"]["lr"] == 0.002
    assert written["rollout"]["teach_loop"] is True
    (tmp_path / "model" / "config.json").unlink()
    again, resume, _ = parse_train_arguments(["--resume", "--run-dir", str(run)])
    assert resume
    assert values_of(again) == values_of(config)


def test_a_kind_leaves_mistakes_to_those_who_name_them():
    for values in ({"model": 3}, {"model": {"path": "x\0"}}, {"model": {"path": "x", "lora_rank": "y"}}, 7):
        with pytest.raises(ValueError, match="validation error"):
            Config.model_validate(values)
    with pytest.raises(ValueError, match="rollout"):
        Config.model_validate({"model": {"path": "x"}, "rollout": 3})
    assert ForestConfig().tokens_per_microbatch == 8192
