"""Models and data by name, against a hub that runs here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mosaic_fast.config import Config, ModelConfig
from mosaic_fast.config.hub import data_path, hub_name, model_files, pinned
from mosaic_fast.config.read import parse_train_command, pinned_config, save_config
from mosaic_fast.errors import UserError
from tests.config.hub_server import REPO, TOKEN, HubServer, hub_in, model_data, offline


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_in(tmp_path, monkeypatch) as server:
        yield server


def test_a_resumed_run_keeps_its_commit(hub: HubServer, tmp_path: Path) -> None:
    first = hub.refs[f"models/{REPO}"]["main"]
    run = tmp_path / "run"
    config = parse_train_command(["--model.path", REPO, "--run-dir", str(run)]).config
    run.mkdir()
    save_config(config, run / "config.toml")
    second = hub.push(f"models/{REPO}", model_data(max_position_embeddings=256))
    hub.asked.clear()
    for more in (["--model.path", REPO], [f"--model.path={REPO}"], [f"--model.path=hf:{REPO}@main"], []):
        again = parse_train_command(["--resume", "--run-dir", str(run), *more]).config
        assert again.model.path == f"hf:{REPO}@{first}"
    toml = tmp_path / "a.toml"
    toml.write_text(f'run_dir = "{run}"\n[model]\npath = "{REPO}"\n')
    assert parse_train_command([str(toml), "--resume"]).config.model.path == f"hf:{REPO}@{first}"
    assert not hub.asked
    anew = parse_train_command(["--model.path", REPO]).config
    assert anew.model.path == f"hf:{REPO}@{second}"
    assert anew.rollout.max_rollout_tokens == 256
    with pytest.raises(UserError, match=r"model\.path: the run has"):
        parse_train_command(["--resume", "--run-dir", str(run), "--model.path", f"{REPO}@{second}"])
    assert pinned_config(Config(model=ModelConfig(path=REPO))).model.path == f"hf:{REPO}@{second}"


def test_a_local_folder_wins_unless_the_hub_is_named(hub: HubServer) -> None:
    Path(REPO).mkdir(parents=True)
    assert hub_name(REPO) is None
    assert model_files(REPO) == Path(REPO)
    assert pinned(f"hf:{REPO}", "model.path", "model").startswith(f"hf:{REPO}@")
    assert hub_name(str(Path(REPO).with_name("mistyped"))) is None, "beside a folder that is here"
    for local in ("embedded", "./a/b", "/a/b", "a/b/c", "a", "a/b.jsonl", "a/b.json"):
        assert hub_name(local) is None


def test_tasks_are_files_of_data_sets(hub: HubServer, tmp_path: Path) -> None:
    rows = b'{"prompt": "pay", "kind": "benign"}\n'
    commit = hub.push("datasets/org/tasks", {"README.md": b"", "data/tasks.jsonl": rows})
    options = ["--env.name", "bank:Bank", "--env.tasks", "org/tasks"]
    name = str(parse_train_command(options).config.env.tasks)
    assert name == f"hf:org/tasks@{commit}"
    assert data_path(name).read_bytes() == rows
    assert data_path("hf:org/tasks:data/tasks.jsonl").read_bytes() == rows
    hub.push("datasets/org/tasks", {"a.jsonl": rows, "b.jsonl": rows})
    assert data_path(name).read_bytes() == rows, "pinned"
    with pytest.raises(
        UserError, match=r"env\.tasks: .* several files of tasks \(a\.jsonl, b\.jsonl\): name one"
    ):
        data_path("org/tasks")
    with pytest.raises(UserError, match=r"has no c\.jsonl"):
        data_path("org/tasks:c.jsonl")


def test_what_cannot_be_had_is_one_line(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refusal(path: str) -> str:
        with pytest.raises(UserError) as caught:
            parse_train_command(["--model.path", path])
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("model.path: ")
        return str(caught.value)

    assert "there is no folder org/none here, and the hub has no org/none" in refusal("org/none")
    assert "has no revision 'v9'" in refusal(f"{REPO}@v9")
    assert "cannot be downloaded" in refusal("hf:org/a--b")
    hub.gated.add(f"models/{REPO}")
    assert "accepted its terms" in refusal(REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = parse_train_command(["--model.path", REPO]).config
    save_config(config, tmp_path / "config.toml")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not written, "the token is kept nowhere"
    offline(monkeypatch)
    assert "cannot be reached" in refusal("org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refusal("org/other")
