"""An evaluation that was stopped in whatever way goes on, and ends as if nothing had stopped it."""

import json
import math
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError
from mosaic_fast.evaluate import evaluate_policy
from mosaic_fast.setup import build
from mosaic_fast.setup.build import build_setup
from mosaic_fast.setup.model_folder import model_folder
from tests.evaluate.serving import Allowance, Row, evaluate, served_model


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def figures(path: Path) -> Row:
    found = json.loads(path.read_text())
    return {key: found[key] for key in ("suites", "rates", "means")}


def test_killed_and_interrupted_is_uninterrupted(
    world_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """kill -9 in the middle, Ctrl-C, and on to the end: every episode once, and the figures of one go."""
    answers = Allowance(20)  # of the 24 episodes' 80 or so: not all has been played when a signal is sent
    with served_model(answers=answers) as served:
        options = ["--model-name", "m", "--config", str(world_config), "--tasks", "24", "--concurrency", "2"]
        arguments = [served.url, *options, "--out", str(tmp_path / "out")]
        command = [sys.executable, "-m", "mosaic_fast.evaluate", *arguments]
        lines = tmp_path / "out" / "outcomes.jsonl"

        killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_lines(lines, 3, killed)
        killed.kill()
        killed.communicate()
        with lines.open("a") as file:
            file.write('{"suite": "wor')  # the line it was writing
        kept = lines.read_text().count("\n")
        assert kept < 24

        answers.allow(20)
        stopped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_lines(lines, kept + 2, stopped)
        stopped.send_signal(signal.SIGINT)
        _, said = stopped.communicate(timeout=600)
        assert stopped.returncode == 130
        assert f"go on with: python -m mosaic_fast.evaluate {served.url}" in said
        assert "Traceback" not in said
        assert lines.read_text().count("\n") < 24

        answers.allow(math.inf)
        assert evaluate(monkeypatch, *arguments, "--json", tmp_path / "resumed.json") == 0
        asked = len(served.requests)
        assert evaluate(monkeypatch, *arguments, "--json", tmp_path / "again.json") == 0
        assert len(served.requests) == asked  # all is there: nothing is played
        arguments = [served.url, *options, "--json", str(tmp_path / "one-go.json")]
        assert evaluate(monkeypatch, *arguments) == 0
    one_go = figures(tmp_path / "one-go.json")
    assert figures(tmp_path / "resumed.json") == one_go
    assert figures(tmp_path / "again.json") == one_go
    assert one_go["suites"]["world"]["rollouts"] == 24


def test_tool_calls_have_the_form_that_the_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In every chat of an evaluation, as in training."""
    config = tmp_path / "run.toml"
    config.write_text('rollout.call_format = "hermes"')
    named: list[str] = []
    usual = build.load_call_format
    monkeypatch.setattr(build, "load_call_format", lambda name: named.append(name) or usual(name))
    assert evaluate(monkeypatch, "embedded", "--tasks", 1, "--config", config) == 0
    assert named == ["hermes"] * 3  # of the run, and with the loop taught and without


def test_a_sampled_evaluation_goes_on_with_the_same_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Draws belong to the episode, not to when it is played: half the lines lost, the same lines again."""
    options = ["embedded", "--tasks", 8, "--samples", 2, "--temperature", 1.0]
    lines = tmp_path / "out" / "outcomes.jsonl"
    assert evaluate(monkeypatch, *options, "--out", tmp_path / "out", "--json", tmp_path / "a.json") == 0
    first = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join(first[::2]))
    assert evaluate(monkeypatch, *options, "--out", tmp_path / "out", "--json", tmp_path / "b.json") == 0
    assert sorted(lines.read_text().splitlines(keepends=True)) == sorted(first)
    assert figures(tmp_path / "a.json") == figures(tmp_path / "b.json")
    texts = [json.loads(line)["steps"] for line in first]
    assert len({json.dumps(steps) for steps in texts}) > 8  # the samples of a task are not the same


def test_episodes_are_those_of_an_evaluation_inside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sampled: the same tasks, and for each the draws of its own number."""
    setup = build_setup(Config(), model_folder("embedded"))
    with closing(setup.engine):
        inside = evaluate_policy(setup, "heldout", 30, temperature=1.0)
    path = tmp_path / "x.json"
    assert evaluate(monkeypatch, "embedded", "--tasks", 30, "--temperature", 1.0, "--json", path) == 0
    found = figures(path)["rates"]
    assert {name: (rate["hits"], rate["total"]) for name, rate in found.items()} == {
        name: (rate.hits, rate.total) for name, rate in inside.items() if rate.total
    }


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--tasks", 4), "tasks: it has 3, you ask for 4"),
        (("--temperature", 0.5), "temperature: it has 0.0, you ask for 0.5"),
        (("--split", "train"), "split: it has 'heldout', you ask for 'train'"),
        (("--max-step-tokens", 50), "suites.world.max_step_tokens: it has 72, you ask for 50"),
    ],
)
def test_another_evaluation_s_folder_is_refused(
    changed: tuple[object, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert evaluate(monkeypatch, "embedded", "--tasks", 3, "--out", tmp_path / "out") == 0
    before = (tmp_path / "out" / "outcomes.jsonl").read_bytes()
    with pytest.raises(UserError, match=named):
        evaluate(monkeypatch, "embedded", "--tasks", 3, "--out", tmp_path / "out", *changed)
    assert (tmp_path / "out" / "outcomes.jsonl").read_bytes() == before


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same folder name is not the same model."""
    assert evaluate(monkeypatch, "embedded", "--tasks", 3, "--out", tmp_path / "out") == 0
    settings = tmp_path / "out" / "settings.json"
    stored = json.loads(settings.read_text())
    stored["model"]["weights_sha256"]["model.safetensors"] = "0" * 64
    settings.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"model.weights_sha256.model.safetensors: it has '000"):
        evaluate(monkeypatch, "embedded", "--tasks", 3, "--out", tmp_path / "out")
