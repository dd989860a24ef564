"""The cold start as a user starts it: what it learns, resumed to the bit, and what training makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from mosaic_fast.cli import run_cli
from mosaic_fast.config.read import parse_train_arguments, parse_train_command
from mosaic_fast.errors import UserError
from mosaic_fast.report.collect import collect_run
from mosaic_fast.run import summary
from mosaic_fast.sft import sft
from mosaic_fast.train import train
from tests.preferences.endpoint import Json, endpoint
from tests.run.test_run import assert_same_run, learned

STEPS = 4
WORLD = ("--sft.demonstrations", "12", "--sft.per-step", "6", "--steps", str(STEPS), "--env.eval-tasks", "3")
CALL = {"id": "1", "function": {"name": "read_file", "arguments": '{"path": "budget.pdf"}'}}
MESSAGES = [
    {"role": "user", "content": "read budget.pdf."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "file text: ancient tides."},
    {"role": "assistant", "content": "the task is done."},
]
PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}}}
TALK = {"messages": MESSAGES, "tools": [{"name": "read_file", "parameters": PARAMETERS}]}


@pytest.fixture(scope="session")
def small(options: list[str]) -> list[str]:
    """The options of a short cold start: those of a short run, with one optimiser step a step."""
    return [*options, "--optim.epochs", "1", "--optim.lr", "0.003", "--trackers.console", "quiet"]


@pytest.fixture(scope="session")
def cold(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cold start on the world's own demonstrations that nothing interrupted."""
    folder = tmp_path_factory.mktemp("cold") / "run"
    assert run([*small, *WORLD], folder) == 0
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take longer than the rest of such a run."""
    monkeypatch.setattr(summary, "draw_curves", lambda *_: None)


def run(options: Sequence[str], folder: Path, *more: str) -> int:
    command = parse_train_command([*options, "--run-dir", str(folder), *more], "mosaic_fast.sft")
    return sft(command.config, command.name, resume=command.resume)


def talks(folder: Path, *rows: object) -> str:
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "talks.jsonl")


def test_it_learns_and_leaves_what_training_leaves(cold: Path):
    rows = learned(cold)
    assert rows[-1]["policy/nll"] < rows[0]["policy/nll"]
    assert all(row["tree/sharing"] > 1.2 and row["tree/ideal_speedup"] > 1.1 for row in rows)
    assert not any(name.startswith("mismatch/") for row in rows for name in row)
    assert rows[-1]["sft/passes"] == 2.0
    names = {path.name for path in cold.iterdir()}
    assert names >= {"config.toml", "sft.json", "summary.json", "curves.png", "metrics.jsonl", "checkpoints"}
    kept = json.loads((cold / "summary.json").read_text())
    assert kept["complete"]
    assert set(kept["before"]) == set(kept["after"])
    tasks = [
        json.loads(line)["task_id"]
        for file in sorted((cold / "trajectories").iterdir())
        for line in file.open()
    ]
    first, second = tasks[:12], tasks[12:]
    assert len({*first}) == len({*second}) == 12, "in a pass each is learnt from once"
    assert first != second, "each pass has an order of its own"
    assert collect_run(cold, 100).notes == []


def test_resumed_is_uninterrupted(small: list[str], cold: Path, tmp_path: Path, quick: None):
    """From a checkpoint in the middle of a pass: the same bits as the cold start that nothing stopped."""
    folder = tmp_path / "run"
    shutil.copytree(cold, folder)
    for step in (STEPS - 1, STEPS):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")
    assert run([*small, *WORLD], folder, "--resume") == 0
    assert_same_run(cold, folder, STEPS)
    with pytest.raises(UserError, match=r"sft\.demonstrations: the run has 12, you ask for 11"):
        run([*small, *WORLD], folder, "--resume", "--sft.demonstrations", "11")


def test_training_goes_on_from_it_as_its_reference(small: list[str], cold: Path, tmp_path: Path, quick: None):
    """The first step's KL is to the cold start itself; what suits supervised learning is not taken over."""
    checkpoint = cold / "checkpoints" / f"step-{STEPS:06d}"
    taken, _, _ = parse_train_arguments(["--model.path", str(cold)])
    assert taken.model.path == str(checkpoint), "a run stands for its newest checkpoint"
    assert (taken.optim.lr, taken.optim.epochs) == (1e-6, 1)
    assert (taken.rollout.teach_loop, taken.rollout.max_step_tokens) == (False, 24)
    arguments = [*small, "--model.path", str(checkpoint), "--steps", "1", "--env.eval-tasks", "0"]
    config, _, name = parse_train_arguments([*arguments, "--run-dir", str(tmp_path / "run")])
    assert train(config, name) == 0
    (row,) = learned(tmp_path / "run")
    assert row["policy/kl"] == pytest.approx(0.0, abs=1e-9)
    assert row["tree/unique_tokens"] > 0


def test_adapters_learn_from_a_file(
    small: list[str], tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
):
    """Of the words that the template sentences bring, the world's tokenizer does not know all."""
    file = talks(tmp_path, TALK, TALK)
    own = ["--model.lora-rank", "4", "--sft.conversations", file, "--sft.per-step", "2", "--steps", "3"]
    own += ["--trackers.console", "plain"]
    assert run([*small, *own, "--env.eval-tasks", "0"], tmp_path / "run") == 0
    rows = learned(tmp_path / "run")
    assert rows[-1]["policy/nll"] < rows[0]["policy/nll"]
    assert rows[0]["tree/sharing"] == 2.0, "the same conversation twice"
    assert (tmp_path / "run" / "checkpoints" / "step-000003" / "adapter").is_dir()
    talks(tmp_path, TALK, {**TALK, "messages": [*MESSAGES[:3], {"role": "assistant", "content": "done."}]})
    assert "trained tokens are the tokenizer's unknown one" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"learnt from .* put its files .* back, or start a new run"):
        run([*small, *own, "--env.eval-tasks", "0"], tmp_path / "run", "--resume", "--steps", "4")


def test_conversations_apart_are_measured_before_and_after(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
):
    """As the loss measures them: what one run holds out is what the other one begins with."""
    other = {**TALK, "messages": [{"role": "user", "content": "please read budget.pdf."}, *MESSAGES[1:]]}
    files = []
    for name, talk in (("one", TALK), ("two", other)):
        (tmp_path / name).mkdir()
        files.append(talks(tmp_path / name, talk))
    options = [*small, "--sft.per-step", "1", "--steps", "3", "--env.eval-tasks", "0"]
    runs = []
    for name, learnt, apart in (("a", *files), ("b", *files[::-1])):
        own = ["--sft.conversations", learnt, "--sft.heldout-conversations", apart]
        assert run([*options, *own, "--trackers.console", "plain"], tmp_path / name) == 0
        runs.append(learned(tmp_path / name))
    for mine, theirs in (runs, runs[::-1]):
        assert mine[0]["heldout/nll_before"] == pytest.approx(theirs[0]["policy/nll"], rel=1e-5)
        assert "heldout/nll" not in mine[1]
        assert mine[2]["heldout/nll"] < mine[0]["heldout/nll_before"]
    assert f"{runs[1][0]['heldout/nll_before']:.3f} nats a trained token before, " in capsys.readouterr().out
    own = ["--sft.conversations", files[0], "--sft.heldout-conversations", files[0]]
    with pytest.raises(UserError, match=r"talks\.jsonl, line 1: .* held out, and learnt from as well"):
        run([*options, *own], tmp_path / "both")


def test_plans_by_a_model_are_asked_for_once(small: list[str], tmp_path: Path, quick: None):
    def think(request: Json) -> Json:
        messages = cast("list[dict[str, str]]", request["messages"])
        turn = json.loads(messages[1]["content"])["the turn"]
        return {"plan": "next: read." if "call" in turn else "all done.", "check": ""}

    file = talks(tmp_path, TALK, TALK)
    with endpoint(think) as served:
        own = ["--sft.conversations", file, "--sft.plans", "llm", "--judge.endpoint", served.url]
        own += ["--judge.model", "m", "--judge.cache", str(tmp_path / "plans"), "--steps", "1"]
        for folder, asked in (("one", 2), ("two", 2)):
            assert run([*small, *own, "--env.eval-tasks", "0"], tmp_path / folder) == 0
            assert len(served.requests) == asked, "equal turns and later runs find the answer"
    row = json.loads((tmp_path / "two" / "trajectories" / "step-000001.jsonl").read_text().splitlines()[0])
    assert [step["plan"] for step in row["steps"]] == ["next: read.", "all done."]


def test_mistakes_are_one_line_and_leave_no_folder(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
):
    file = talks(tmp_path, TALK, {"messages": MESSAGES[:1]})
    long = {"messages": [{"role": "user", "content": "tides " * 600}, MESSAGES[-1]]}
    (tmp_path / "long.jsonl").write_text(json.dumps(TALK) + "\n" + json.dumps(long) + "\n")
    asked = ("--sft.plans", "llm", "--sft.demonstrations", "2")
    for options, said in (
        (["--sft.conversations", file], f"{file}, line 2: there is no assistant's message"),
        (["--sft.conversations", str(tmp_path / "long.jsonl")], "long.jsonl, line 2: it has "),
        ([], "there is nothing to learn from: set sft.conversations or sft.demonstrations"),
        (["--sft.demonstrations", "2", "--loss.name", "dapo"], "[sft] needs loss.name = 'sft' or your own"),
        (asked, "sft.plans = 'llm' needs judge.endpoint and judge.model"),
    ):
        folder = tmp_path / "run"
        assert run_cli(lambda options=options: run([*small, *options], tmp_path / "run")) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) <= 2  # a configuration's mistakes stand below its name
        assert not folder.exists()
    config, _, name = parse_train_arguments(["--sft.demonstrations", "2", "--run-dir", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r"run it by python -m mosaic_fast\.sft"):
        train(config, name)
