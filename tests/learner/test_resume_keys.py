"""Every key of the configuration is one that a resumed run may have anew, for a reason, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from mosaic_fast.config import Config
from mosaic_fast.config.read import load_config, parse_train_command, save_config
from mosaic_fast.config.resume import ACCEPTED, changes, flatten, refuse_differences
from mosaic_fast.errors import UserError
from mosaic_fast.run.folder import RunFolder
from mosaic_fast.train import train
from tests.run.test_run import assert_same_run, learned, run

BASE = {
    "judge": {"name": "llm", "endpoint": "http://node3:3000/v1", "model": "m"},
    "env": {"name": "agentdojo"},
    "engine": {"kind": "sglang"},
    "model": {"lora_rank": 2},
}
STORED = Config.model_validate(BASE).resolved()
KEYS = list(flatten(STORED.model_dump()))


def another(key: str, value: object) -> object:
    """A value of the key's type that is not its own; whether it makes sense does not matter here."""
    section, _, name = key.rpartition(".")
    model: type[BaseModel] = type(getattr(STORED, section)) if section else Config
    annotation = model.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return next((choice for choice in get_args(annotation) if choice != value), "another")
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (*value, "more")
    return "another"


def with_value(key: str, value: object) -> Config:
    section, _, name = key.rpartition(".")
    if not section:
        return STORED.model_copy(update={name: value})
    return STORED.model_copy(update={section: getattr(STORED, section).model_copy(update={name: value})})


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_in_the_table_or_refused(key: str):
    value = flatten(STORED.model_dump())[key]
    asked = with_value(key, another(key, value))
    if key in ACCEPTED:
        assert ACCEPTED[key]
        assert [change.key for change in changes(STORED, asked)] == ([] if key == "run_dir" else [key])
        return
    with pytest.raises(UserError, match=rf"(?m)^  {key}: the run has "):
        refuse_differences(STORED, asked)


def test_the_table_names_keys_that_there_are():
    assert set(ACCEPTED) <= set(KEYS)


def test_fewer_steps_and_another_judge_are_refused():
    with pytest.raises(UserError, match="more steps but not fewer"):
        refuse_differences(STORED, with_value("steps", STORED.steps - 1))
    assert {
        f"judge.{k}" for k in ("endpoint", "timeout_s", "retries", "max_concurrent", "api_key_env")
    } <= set(ACCEPTED)
    assert {"judge.max_calls", "checkpoint.keep", "model.threads", "trackers.console", "steps"} <= set(
        ACCEPTED
    )
    for key in ("judge.model", "judge.temperature", "judge.prompt", "optim.lr", "model.path", "seed"):
        assert key not in ACCEPTED


def test_what_is_accepted_takes_effect_and_is_noted(tmp_path: Path):
    save_config(STORED.model_copy(update={"run_dir": str(tmp_path)}), tmp_path / "config.toml")
    options = [
        *("--resume", "--run-dir", str(tmp_path), "--judge.endpoint", "http://node4:9/v1", "--steps", "90"),
        *("--model.threads", "2", "--checkpoint.keep", "9"),
    ]
    config = parse_train_command(options).config
    assert (config.judge.endpoint, config.steps, config.model.threads, config.checkpoint.keep) == (
        *("http://node4:9/v1", 90, 2, 9),
    )
    assert config.optim.schedule_steps == STORED.steps
    with RunFolder(config, "world", resume=True) as folder:
        told = [change.said() for change in folder.open(config, 7)]
    assert len(told) == 4
    assert load_config(tmp_path / "config.toml").resolved() == config
    (row,) = map(json.loads, (tmp_path / "changes.jsonl").read_text().splitlines())
    assert row["after_step"] == 7
    assert row["changed"]["steps"] == [STORED.steps, 90]
    again = parse_train_command(["--resume", "--run-dir", str(tmp_path), "--steps", "95"]).config
    assert (again.steps, again.optim.schedule_steps) == (95, STORED.steps)
    assert parse_train_command(["--resume", "--run-dir", str(tmp_path)]).config == config


def test_more_steps_leave_those_before_as_they_are(options: list[str], tmp_path: Path):
    """Two steps, resumed to three: the first two are those of the short run, the third has its last rate."""
    short = [*options, "--env.eval-tasks", "0", "--rollout.prompts-per-step", "1", "--steps", "2"]
    assert run(short, tmp_path / "run") == 0
    two = learned(tmp_path / "run")
    config = parse_train_command(["--resume", "--run-dir", str(tmp_path / "run"), "--steps", "3"]).config
    assert train(config, resume=True) == 0
    three = learned(tmp_path / "run")
    assert three[:2] == two
    assert three[2]["optim/lr"] == pytest.approx(0.001 * config.optim.final_lr_frac)
    assert_same_run(tmp_path / "run", tmp_path / "run", 3)
