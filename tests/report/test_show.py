"""`python -m mosaic_fast.show`: what happened, told apart, and what was asked for only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mosaic_fast.cli import run_cli
from mosaic_fast.show import main
from tests.report.runs_for_tests import write_run


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["show", *arguments])
    assert run_cli(main) == 0
    return capsys.readouterr().out


def test_a_group_with_its_parts_and_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = str(write_run(tmp_path / "run"))
    text = shown(monkeypatch, capsys, run, "--step", "2", "--count", "1")
    assert text.startswith("step 2  task train-0  ")
    for part in (
        "user    post the agenda 0",
        "plan    read it",
        "check   no risk",
        "action  done.",
        "tool    file",
    ):
        assert f"  {part}" in text, part
    assert "#3  answered, harm  reward" in text
    assert "#2  refused, progress 0  reward" in text
    assert "forked from #0" in text
    assert "#0 > #3  " in text
    assert "more groups fit; --count 0 shows all" in text
    assert "step 3  task train-0" in shown(monkeypatch, capsys, run), "the last step where none is named"


def test_only_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = str(write_run(tmp_path / "run"))
    text = shown(monkeypatch, capsys, run, "--status", "refused", "--kind", "benign")
    assert "refused, " in text
    assert "answered, " not in text
    assert text.count("  task train-") == 1


def test_a_text_steers_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = str(write_run(tmp_path / "run", text="\x1b[2J\x9b1m[red]\nnext"))
    text = shown(monkeypatch, capsys, run)
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "[red]\n          next" in text, "a further line stands below the first"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "9"], "--step: .* 1 to 3, not of 9"),
        (["--task", "none"], "has no such trajectory"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
):
    monkeypatch.setattr("sys.argv", ["show", str(write_run(tmp_path / "run")), *arguments])
    assert run_cli(main) == 2
    assert re.search(said, capsys.readouterr().err)
    monkeypatch.setattr("sys.argv", ["show", str(tmp_path)])
    assert run_cli(main) == 2
    assert "is not a run folder" in capsys.readouterr().err
