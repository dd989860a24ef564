"""What `import mosaic_fast` hands out: the page of the API as it is written, objects, import orders."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

import mosaic_fast
from mosaic_fast import Config, Run, UserError
from mosaic_fast.run.interrupt import Interrupt
from mosaic_fast.setup.given import take_given
from mosaic_rollout.environments.world import WorldEnvironment
from mosaic_rollout.types import Rollout, Task, Verdict

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
TASKS = [{"prompt": "Pay alice"}, {"prompt": "Pay mallory", "kind": "harmful"}]


class Inbox:
    def reset(self, **row: object) -> None:
        self.sent = []

    def send(self, to: str) -> str:
        """Send it.

        Args:
            to: Whom.
        """
        self.sent.append(to)
        return "sent"

    def get_reward(self) -> float:
        return float(len(self.sent))


class Scores:
    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def score_group(self, group: list[Rollout]) -> list[float]:
        return [self.value] * len(group)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """What the examples of docs/api.md leave behind, run in their order in an empty folder."""
    code = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M | re.S
    )
    before = Path.cwd()
    names: dict[str, object] = {"__name__": "page"}
    os.chdir(tmp_path_factory.mktemp("api"))
    try:
        exec(compile("\n".join(code), "docs/api.md", "exec"), names)
        names["folder"] = Path.cwd() / "runs" / "bank"
        yield names
    finally:
        os.chdir(before)


def test_the_page_runs_as_it_is_written(page: dict[str, object]) -> None:
    """And its table names what the package hands out."""
    run = page["run"]
    assert isinstance(run, Run)
    assert run.summary["steps"] == 2
    text = PAGE.read_text(encoding="utf-8")
    for name in mosaic_fast.__all__:
        assert f"`{name}`" in text
        assert getattr(mosaic_fast, name).__doc__


def test_a_run_folder_names_the_objects_it_was_given(page: dict[str, object]) -> None:
    run = mosaic_fast.load_run(str(page["folder"]))
    assert (run.config.env.name, run.config.judge.name) == ("page:Bank", "page:PrefersShort")
    given = json.loads((run.path / "given.json").read_text())
    assert given["tasks"].startswith("10 tasks, sha256 ")
    assert {given["environment"], given["judge"]} == {"page:Bank", "page:PrefersShort"}


@pytest.mark.parametrize(
    "given", [{}, {"environment": Inbox, "tasks": TASKS}, {"environment": "world", "judge": "rule"}]
)
def test_a_resume_with_other_objects_is_refused_and_changes_nothing(
    page: dict[str, object], given: dict[str, object]
) -> None:
    folder = Path(str(page["folder"]))
    config = mosaic_fast.load_run(folder).config.model_copy(update={"run_dir": str(folder)})
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(UserError, match=r"given environment page:Bank, tasks 10 .* now it is given .* again"):
        mosaic_fast.train(config, resume=True, **given)  # pyrefly: ignore [bad-argument-type]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_names_train_what_objects_do_in_a_thread_with_an_event_loop_too(
    page: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same class and tasks by name: the same tokens. A notebook's cell runs inside an event loop."""
    by_object = mosaic_fast.load_run(str(page["folder"]))
    [code] = re.findall(r"^(class Bank.*?)^config", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "by_name.py").write_text(code)
    rows = page["tasks"]
    assert isinstance(rows, list)
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    values = by_object.config.model_dump(exclude_none=True)
    values |= {"run_dir": "r", "steps": 1, "env": {**values["env"], "eval_tasks": 0}}
    config = Config.model_validate(values)
    found: list[Run] = []

    async def cell() -> None:
        found.append(
            mosaic_fast.train(
                config, environment="by_name:Bank", tasks="tasks.jsonl", judge="by_name:PrefersShort"
            )
        )

    thread = Thread(target=lambda: asyncio.run(cell()))
    thread.start()
    thread.join()
    [run] = found
    assert run.complete
    assert not (run.path / "given.json").exists()
    tokens = [[row["token_ids"] for row in one.trajectories(1)] for one in (run, by_object)]
    assert tokens[0] == tokens[1]
    with pytest.raises(UserError, match="no trajectories of step 9"):
        list(run.trajectories(9))


def test_signals_are_left_alone_in_other_threads() -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with Interrupt() as interrupt, interrupt.abandonable():
                pass
        except BaseException as error:  # noqa: BLE001  shown below
            raised.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert raised == []


class Own(WorldEnvironment):
    """A whole environment of a user's."""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"environment": Inbox()}, "pass the class itself"),
        ({"environment": Inbox}, "it needs tasks"),
        ({"environment": 3}, "pass the class itself"),
        ({"environment": Inbox, "tasks": [{"text": "no prompt"}] * 2}, 'tasks, line 1: .*"prompt"'),
        ({"environment": Inbox, "tasks": [{"prompt": "a", "at": object()}] * 2}, "line 1: .*plain JSON"),
        ({"environment": Inbox, "tasks": TASKS[:1]}, "tasks has one task"),
        ({"environment": Inbox, "tasks": TASKS, "heldout_tasks": TASKS}, "held out and trained on"),
        ({"environment": Own(), "tasks": TASKS}, "has tasks of its own"),
        ({"tasks": TASKS}, "rows belong to an environment of your own"),
        ({"tasks": [*TASKS, Task("a", "benign", "train")]}, "rows .* or of Task"),
        ({"tasks": [Task("a", "benign", "train")] * 2}, "'a' is there more than once"),
        ({"environment": "no such"}, "env.name 'no such' is none of"),
        ({"judge": object()}, "no method judge or score_group"),
        ({"judge": "nonsense"}, "judge.name"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        take_given(Config(), **given)  # pyrefly: ignore [bad-argument-type]


def test_nothing_is_trained_on_what_is_for_evaluation_only() -> None:
    class Harm(Own):
        name = "agentharm"

    with pytest.raises(UserError, match="agentharm is for evaluation only"):
        take_given(Config(), environment=Harm())


def test_objects_are_guarded_as_names_are() -> None:
    """A judge's numbers and an environment's tasks are looked at, an episode gets copies."""
    config, given = take_given(Config(), environment=Inbox, tasks=TASKS, judge=Scores(float("nan")))
    assert config.judge.name == "tests.test_front_door:Scores"
    assert given.environment is not None
    assert given.judge is not None
    task = given.environment.sample("train", 1, 0)[0]
    assert given.environment.reset(task).score(None).harm is False
    with pytest.raises(UserError, match="each finite"):
        given.judge.judge([[_rollout(task)]])


def _rollout(task: Task) -> Rollout:
    none = np.zeros(1, dtype=np.int64)
    verdict = Verdict(False, True, 1.0)
    return Rollout(0, 0, task, none, none > 0, none.astype("f"), (), "answered", verdict, (), 0, 1, 0)


def test_chosen_tasks_of_an_environment_are_played_alone() -> None:
    world = WorldEnvironment()
    chosen = [*world.sample("train", 2, 5), *world.sample("heldout", 1, 5)]
    _, given = take_given(Config(), tasks=chosen)
    assert given.environment is not None
    ids = {task.task_id for task in given.environment.sample("train", 6, 0)}
    assert ids == {task.task_id for task in chosen[:2]}
    assert [task.task_id for task in given.environment.sample("heldout", 1, 0)] == [chosen[2].task_id]
    assert list(given.record) == ["tasks"]


IMPORTS = (
    "import mosaic_fast.train; import mosaic_fast.evaluate",
    "from mosaic_fast import train, evaluate",
    "from mosaic_fast.train import train as command; from mosaic_fast.evaluate import evaluate_policy",
)


def test_every_order_of_imports_gives_the_same_in_fresh_processes() -> None:
    """A module that can be called, whichever came first; each order in a fork that has none of it yet."""
    program = f"""
import os, sys
import mosaic_fast
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules), "import mosaic_fast imports them"
import mosaic_fast.api, mosaic_fast.train, mosaic_fast.evaluate.play, mosaic_fast.setup.build
for name in [name for name in sys.modules if name.startswith("mosaic_")]:
    del sys.modules[name]  # what they have imported of others stays: a fork is quick
def check(order):
    names = {{}}
    exec("; ".join(order), names)
    import mosaic_fast, mosaic_fast.api as api
    assert mosaic_fast.train is names["train"] is sys.modules["mosaic_fast.train"]
    assert mosaic_fast.evaluate is names["evaluate"] is sys.modules["mosaic_fast.evaluate"]
    assert callable(names["command"]) and names["command"] is mosaic_fast.train.train
    calls = []
    api.train = lambda *a, **k: calls.append(("train", a, k))
    api.evaluate = lambda *a, **k: calls.append(("evaluate", a, k))
    names["train"](1, judge=2), names["evaluate"]("m")
    assert calls == [("train", (1,), {{"judge": 2}}), ("evaluate", ("m",), {{}})]
for order in {list(permutations(IMPORTS))!r}:
    child = os.fork()
    if child == 0:
        try:
            check(order)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_package_hands_out_what_it_names() -> None:
    import mosaic_kernels
    import mosaic_rollout

    for package in (mosaic_kernels, mosaic_rollout):
        assert all(getattr(package, name) is not None for name in package.__all__)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            package.nothing  # noqa: B018  # pyrefly: ignore [missing-attribute]


def test_nothing_installed_looks_for_the_workshop() -> None:
    """No import of tests, tools or bench."""
    for package in ("mosaic_fast", "kernels/mosaic_kernels", "rollout/mosaic_rollout"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(from|import) (tests|tools|bench)\b", text, re.M), path
