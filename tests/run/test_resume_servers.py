"""A run whose servers are gone is resumed with others."""

from pathlib import Path

import pytest

from mosaic_fast.config import Config, EngineConfig
from mosaic_fast.config.read import parse_train_arguments, save_config
from mosaic_fast.errors import UserError


def test_servers_may_change_on_resume_and_what_they_compute_may_not(tmp_path: Path):
    save_config(Config(engine=EngineConfig(kind="sglang", urls=("http://a:1",))), tmp_path / "config.toml")
    run = ["--resume", "--run-dir", str(tmp_path), "--engine.kind", "sglang"]
    config, _, _ = parse_train_arguments(
        [*run, "--engine.urls", "http://b:2", "--engine.hang-timeout-s", "9"]
    )
    assert config.engine.urls == ("http://b:2",)
    assert config.engine.hang_timeout_s == 9.0
    with pytest.raises(UserError, match=r"engine\.deterministic: the run has False"):
        parse_train_arguments([*run, "--engine.deterministic"])
