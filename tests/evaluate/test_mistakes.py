"""Every mistake a user can make is one sentence that names it; nothing is loaded or written before."""

from pathlib import Path

import pytest

from mosaic_fast.errors import UserError
from mosaic_fast.evaluate.store import Store
from tests.evaluate.serving import evaluate

URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "name what to evaluate"),
        (["nowhere"], "there is no folder nowhere"),
        (["embedded", "embedded"], "named twice"),
        (["embedded", "--tasks", 0], "--tasks must be at least 1"),
        (["embedded", "--temperature", -1], "--temperature must be at least 0"),
        (["embedded", "--temperature", "nan"], "--temperature must be at least 0"),
        (["embedded", "--samples", 2], "--samples above 1 needs a --temperature"),
        (["embedded", "--suite", "wurld"], "--suite wurld: env.name 'wurld' is none of world"),
        (["embedded", "--suite", "world,,"], "an empty name"),
        (["embedded", "--suite", "world,world"], "a suite is named twice"),
        (["embedded", "--suite", "agent_safetybench"], "needs env.tasks.*NAME=FILE"),
        (["embedded", "--suite", "agent_safetybench=nowhere.json"], "nowhere.json"),
        (["embedded", "--config", "nowhere.toml"], "there is no configuration file nowhere.toml"),
        (["embedded", "--json", "no/where.json"], "--json: there is no folder"),
        ([URL], "--model-name says which"),
        (["http://", "--model-name", "m"], "is no URL of an endpoint"),
        ([URL, "--model-name", "m", "--protocol", "native", "--write-tools"], "belongs to --protocol loop"),
        ([URL, "--model-name", "m", "--timeout-s", 0], "--timeout-s must be above 0"),
    ],
)
def test_a_mistake_is_named(
    arguments: list[object], named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        evaluate(monkeypatch, *arguments, *(["--out", "out"] if arguments else []))
    assert not list(tmp_path.iterdir())


def test_a_folder_without_weights_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(UserError, match="holds no weights"):
        evaluate(monkeypatch, tmp_path)


def test_a_key_no_header_can_carry_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "sek\nret")
    with pytest.raises(UserError, match=r"the key in \$MY_KEY has characters") as caught:
        evaluate(monkeypatch, URL, "--model-name", "m", "--api-key-env", "MY_KEY", "--tasks", 1)
    assert "sek" not in str(caught.value)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds something else"), Store(tmp_path, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_evaluations_do_not_share_a_folder(tmp_path: Path):
    with (
        Store(tmp_path / "out", {}),
        pytest.raises(UserError, match="another evaluation is writing"),
        Store(tmp_path / "out", {}),
    ):
        pass


def test_a_damaged_line_is_named(tmp_path: Path):
    with Store(tmp_path / "out", {}):
        pass
    (tmp_path / "out" / "outcomes.jsonl").write_text("{}\n")
    with (
        pytest.raises(UserError, match=r"line 1 of .*outcomes.jsonl is damaged"),
        Store(tmp_path / "out", {}),
    ):
        pass
