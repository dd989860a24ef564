"""Every mistake a user can make is one sentence that names it; nothing is loaded or written before."""

from pathlib import Path

import pytest

from mosaic_fast.errors import UserError
from mosaic_fast.evaluate.arguments import parse
from mosaic_fast.evaluate.store import Store
from mosaic_fast.evaluate.targets import resolve
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


def test_a_suite_has_its_own_limits():
    """Beside a benchmark, the embedded model still plays its world as it learnt it."""
    arguments = parse(["embedded", "--suite", "world,bfcl", "--max-steps", "3"])
    world, bfcl = resolve("embedded", arguments).suites
    assert (world.rollout.max_rollout_tokens, world.rollout.teach_loop, world.rollout.max_steps) == (
        512,
        False,
        3,
    )
    assert (bfcl.rollout.max_rollout_tokens, bfcl.rollout.teach_loop, bfcl.rollout.max_steps) == (
        16384,
        True,
        3,
    )


def test_what_is_kept_is_said_when_the_endpoint_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """And only then: a command that is refused is not offered again."""
    options = [URL, "--model-name", "m", "--tasks", 1, "--retries", 0, "--out", tmp_path / "out"]
    with pytest.raises(
        UserError, match=r"episodes are kept in .*; go on with: python -m mosaic_fast.evaluate"
    ):
        evaluate(monkeypatch, *options)
    with pytest.raises(UserError) as caught:
        evaluate(monkeypatch, *options, "--tasks", 2)
    assert "go on with:" not in str(caught.value)
