"""Models by name are loaded and estimated, against a hub that runs here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mosaic_fast.config.read import parse_train_command
from mosaic_fast.evaluate.targets import model_and_config
from mosaic_fast.setup.memory import dry_run
from mosaic_fast.setup.model_folder import load_policy, load_tokenizer, model_folder
from tests.config.hub_server import REPO, HubServer, hub_in, model_data, offline


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_in(tmp_path, monkeypatch) as server:
        yield server


def test_a_model_is_pinned_before_its_weights_are_downloaded(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.refs[f"models/{REPO}"]["main"]
    config = parse_train_command(["--model.path", REPO]).config
    assert config.model.path == f"hf:{REPO}@{commit}"
    assert config.optim.lr == 1e-6, "the defaults are of its kind"
    positions = json.loads(model_data()["config.json"])["max_position_embeddings"]
    assert config.rollout.max_rollout_tokens == min(8192, positions)
    assert not any("safetensors" in path for path in hub.asked)
    assert dry_run(config) == 0
    assert not any("GET" in path and "safetensors" in path for path in hub.asked)
    folder = model_folder(config.model.path)
    assert not (folder / "original").exists()
    assert load_policy(config, folder)
    assert load_tokenizer(folder)
    assert model_and_config(REPO, None)[1] == folder, "evaluated and served too"
    hub.asked.clear()
    offline(monkeypatch)
    assert model_folder(config.model.path) == folder
    assert parse_train_command(["--model.path", REPO]).config.model.path == config.model.path
    assert not hub.asked


def test_a_dry_run_says_what_is_to_be_downloaded(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    hub.push(f"models/{REPO}", {**model_data(), "model-00002.safetensors": b"x" * (54 << 20)})
    dry_run(parse_train_command(["--model.path", REPO]).config)
    assert "0.06 GiB are still to be downloaded from the hub" in capsys.readouterr().out
