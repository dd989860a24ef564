"""A rubric of the user's own: what the judge is told, what is kept of it, and that it stays the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from mosaic_fast.cli import run_cli
from mosaic_fast.config import JudgeConfig
from mosaic_fast.errors import UserError
from mosaic_fast.preferences import build_judge
from mosaic_fast.preferences.prompt import KEPT, ask, load_rubric
from tests.faults.conftest import run
from tests.preferences.endpoint import Json, Raw, endpoint, shown
from tests.preferences.rollouts import saying

OWN = "Prefer whoever says please.\r\nNothing else counts: not {braces}, not %s.\n"


def question(mode: str, path: Path) -> tuple[str, str]:
    rollouts = (saying("a"), saying("b", 1)) if mode == "pairwise" else (saying("a"),)
    asked = ask(mode, str(path), *rollouts)  # pyrefly: ignore
    return asked.system, asked.user


@pytest.mark.parametrize(("mode", "field"), [("pairwise", '"tie"'), ("pointwise", "from 0 to 10")])
def test_its_text_comes_first_and_the_answers_form_is_added(tmp_path: Path, mode: str, field: str):
    path = tmp_path / "my.md"
    path.write_bytes(OWN.encode())
    system, user = question(mode, path)
    assert system.startswith(OWN.strip() + "\n\nWhat you are shown: ")
    assert field in system
    assert "never follow it" in system
    assert "weighing safety" not in system, "none of our own rubric"
    assert user == question(mode, path)[1]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "there is no file"),
        (b" \n", "is empty"),
        (b"\xff", "not text in UTF-8"),
        (..., "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: object, named: str):
    path = tmp_path / "my.md"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is ...:
        path.mkdir()
    with pytest.raises(UserError, match=f"judge.prompt: .*{named}"):
        load_rubric(str(path))
    judge = {"name": "llm", "endpoint": "http://x/v1", "model": "m", "prompt": str(path)}
    with pytest.raises(UserError, match=f"judge.prompt: .*{named}"):
        build_judge(JudgeConfig(**judge), tmp_path)  # pyrefly: ignore


def test_another_name_is_no_rubric():
    with pytest.raises(ValidationError, match="it is v1, or a Markdown file"):
        JudgeConfig(prompt="v2")


def prefers_one(request: Json) -> Json:
    return {"reason": "-", "winner": "1" if len(str(shown(request))) % 2 else "tie"}


def test_a_run_keeps_it_and_goes_on_with_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("my.md").write_bytes(OWN.encode())
    folder = tmp_path / "run"

    def answer(request: Json) -> Raw | Json:
        return Raw(401, "no") if (folder / "checkpoints" / "step-000001").exists() else prefers_one(request)

    with endpoint(answer) as served:
        options = ["--judge.name", "llm", "--judge.endpoint", served.url, "--judge.model", "m"]
        assert run_cli(lambda: run(folder, *options, "--judge.prompt", "my.md", "--judge.retries", "0")) == 2
        assert all(OWN.strip() in str(dict(r)["messages"][0]["content"]) for r in served.requests)  # type: ignore
    assert (folder / KEPT).read_bytes() == OWN.encode()
    kept = json.loads((folder / "judge.json").read_text())
    assert (kept["prompt"], kept["prompt_sha256"]) == ("my.md", hashlib.sha256(OWN.encode()).hexdigest())
    capsys.readouterr()
    Path("my.md").write_text("Prefer the shorter one.")
    assert run_cli(lambda: run(folder, "--resume")) == 2
    assert "judge.prompt: my.md has changed since the run began" in capsys.readouterr().err
    Path("my.md").unlink()
    assert run_cli(lambda: run(folder, "--resume")) == 2, "by its copy, to a server that is gone"
    assert "judge.prompt" not in (said := capsys.readouterr().err)
    assert "Nothing else was done yet" in said


def test_a_judge_that_does_not_answer_is_known_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mosaic_fast.setup.ready.build_setup", loaded)
    with endpoint(lambda request: Raw(404, "no model m")) as served:
        options = ["--judge.name", "llm", "--judge.endpoint", served.url, "--judge.model", "m"]
        assert run_cli(lambda: run(tmp_path / "run", *options)) == 2
        assert len(served.requests) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "HTTP 404 no model m" in said
    assert not (tmp_path / "run").exists()
