"""Held-out evaluation in training: each task once, and wherever a number is stated, the true one."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.evaluate import EVALUATION_SEED, evaluation_tasks
from mosaic_fast.setup.build import Setup
from mosaic_fast.train import train
from mosaic_rollout.environments.sources import draw
from mosaic_rollout.types import Episode, Task

BANK = '''
class Errand:
    def reset(self, **row):
        self.read = False

    def read_file(self, path: str) -> str:
        """Read a file.

        Args:
            path: Name of the file.
        """
        self.read = True
        return "text"

    def get_verdict(self):
        return {"harm": False, "done": self.read}
'''


class Pools:
    """An environment of as many tasks as asked, which repeats them once all were drawn."""

    name = "pools"

    def __init__(self, sizes: dict[str, int]) -> None:
        self._pools = {
            split: [Task(f"{split}-{i}", "benign", split) for i in range(size)]
            for split, size in sizes.items()
        }

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        return draw(self._pools, split, count, seed)

    def reset(self, task: Task) -> Episode:
        raise AssertionError("no task of these is played")


@given(st.integers(1, 40), st.integers(1, 120))
def test_an_evaluation_has_each_task_once(size: int, count: int):
    environment = Pools({"heldout": size})
    tasks = [task.task_id for task in evaluation_tasks(environment, "heldout", count)]
    assert len(tasks) == len(set(tasks)) == min(size, count)
    drawn = [task.task_id for task in environment.sample("heldout", count, EVALUATION_SEED)]
    assert tasks == drawn[: len(tasks)], "the order is that of the draw"


@pytest.fixture
def errands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three tasks to train on and four that are held out, and the options of a run on them."""
    (tmp_path / "errands.py").write_text(BANK)
    for name, words in (("train", "abc"), ("heldout", "defg")):
        rows = [json.dumps({"prompt": f"please read the file {word}.txt"}) for word in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "errands", raising=False)
    return [
        *(
            "--env.name",
            "errands:Errand",
            "--env.tasks",
            "train.jsonl",
            "--env.heldout-tasks",
            "heldout.jsonl",
        ),
        *("--steps", "2", "--rollout.prompts-per-step", "4", "--rollout.group-size", "2", "--run-dir", "run"),
        *("--rollout.max-steps", "2", "--rollout.max-step-tokens", "12", "--trackers.console", "plain"),
    ]


def test_a_run_on_four_heldout_tasks_says_four(
    errands: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Of 300 that the default asks for, before, during and after training."""
    played: Counter[str] = Counter()
    play = Setup.play

    def counting(self, loop, tasks, plan, *, version):
        played.update(task.task_id for task in tasks if task.split == "heldout")
        return play(self, loop, tasks, plan, version=version)

    monkeypatch.setattr(Setup, "play", counting)
    config, resume, name = parse_train_arguments([*errands, "--env.eval-every", "1"])
    assert train(config, name, resume=resume) == 0

    assert set(played.values()) == {4}, "before, after each of two steps, and at the end"
    assert len(played) == 4
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["eval_tasks"] == 4
    for when in ("before", "after"):
        assert summary["counts"][when]["safety/benign_done"][1] == 4
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["heldout/tasks"] for row in rows] == [4, 4]
    shown = capsys.readouterr().out
    assert shown.count("on 4 held-out tasks (all there are of 300)") == 2
    assert "held-out, greedy, 4 tasks" in shown
    assert "300 tasks" not in shown
