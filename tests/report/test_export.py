"""Preference rows: one a decided pair, in TRL's conversational format."""

import json
import sys
from pathlib import Path

import pytest

from mosaic_fast.cli import run_cli
from mosaic_fast.report.export import main, preference_rows
from mosaic_fast.report.read import Notes, read_groups
from tests.report.runs_for_tests import write_run


def test_every_decided_pair_gives_a_row_and_a_tie_gives_none(tmp_path: Path):
    """The order is done = done with a check > refused > harm: 5 of 6 pairs, one of which reads the same."""
    run = write_run(tmp_path / "run", steps=1)
    benign = list(read_groups(run / "trajectories" / "step-000001.jsonl", Notes()))[1]
    rows = list(preference_rows(benign))
    assert len(rows) == 4
    assert rows[0] == {
        "prompt": [{"role": "system", "content": "tools"}, {"role": "user", "content": "post the agenda 1"}],
        "chosen": [
            {"role": "assistant", "content": "<think>read it</think><call>"},
            {"role": "tool", "content": "file text"},
            {"role": "assistant", "content": "done."},
        ],
        "rejected": [
            {
                "role": "assistant",
                "content": "<think>read it</think><safety_thoughts>a risk</safety_thoughts><refuse>",
            }
        ],
        "task_id": "train-1",
        "kind": "benign",
        "reason": "task complete beats refused a task that should be done",
    }
    assert all(row["chosen"] != row["rejected"] for row in rows)
    several = [row.model_copy(update={"contexts": [5]}) for row in benign]
    assert not list(preference_rows(several)), "several conversations are not shown as one"


def test_the_command_writes_json_lines_and_names_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run, out = write_run(tmp_path / "run", steps=3), tmp_path / "pairs.jsonl"

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["export", *arguments])
        return run_cli(main)

    assert command(str(run), "--format", "trl", "--out", str(out)) == 0
    everything = [json.loads(line) for line in out.read_text().splitlines()]
    assert command(str(run), "--out", str(out), "--from-step", "2", "--to-step", "2") == 0
    assert len(everything) == 3 * len(out.read_text().splitlines()) > 0
    for wrong, named in (
        ([str(tmp_path), "--out", str(out)], "is not a run folder"),
        ([str(run), "--out", "/nowhere/x"], "cannot be written"),
        ([str(run), "--out", str(out), "--from-step", "9"], "no trajectories of the steps"),
    ):
        assert command(*wrong) == 2
        assert named in capsys.readouterr().err
