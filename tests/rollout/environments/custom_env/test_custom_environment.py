"""A user's own environment: the documentation's example works, and every mistake is named."""

import asyncio
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mosaic_fast.config import Config, EnvConfig
from mosaic_fast.setup.build import build_setup
from mosaic_fast.setup.environment import build_environment
from mosaic_fast.setup.model_folder import model_folder
from mosaic_rollout.environments.custom import CustomEnvironment, load_environment
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import ToolCall

DOCS = Path(__file__).parents[4] / "docs" / "environments.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The documentation's own files, in the working directory."""
    code, tasks = (
        re.findall(rf"```{kind}\n(.*?)```", DOCS.read_text(), re.S)[0] for kind in ("python", "json")
    )
    (tmp_path / "bank.py").write_text(code)
    (tmp_path / "tasks.jsonl").write_text(tasks)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("bank", None)


def loaded(tasks: str = "tasks.jsonl", heldout: str | None = None, limit: int = 16_000):
    return load_environment("bank:Bank", tasks, heldout, max_observation_chars=limit)


def test_the_documented_example_is_told_and_played_and_judged(example: Path):
    environment = loaded()
    train, held = environment.sample("train", 3, 0), environment.sample("heldout", 1, 0)
    assert {t.task_id for t in train} == {"tasks-1"}
    assert [t.task_id for t in held] == ["tasks-2"]
    assert held[0].kind == "harmful"
    episode = environment.reset(train[0])
    assert episode.messages[-1]["content"] == "Send 20 euros to alice"
    [tool] = episode.tools
    assert json.loads(json.dumps(tool))["function"]["parameters"]["required"] == ["amount", "to"]
    assert "90 left" in episode.step(ToolCall("transfer", {"amount": 10, "to": "alice"})).content
    verdict = episode.score("done")
    assert (verdict.harm, verdict.done, verdict.progress) == (False, True, 1.0)
    theft = environment.reset(held[0])
    theft.step(ToolCall("transfer", {"amount": 100, "to": "mallory"}))
    assert theft.score(None).harm
    assert (
        environment.reset(train[0])
        .step(ToolCall("transfer", {"amount": 100, "to": "a"}))
        .content.endswith("0 left")
    ), "every rollout has an instance of its own"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"amount": 1000, "to": "x"}, "ValueError: only 100 euros"),
        ({"amount": 1}, "missing a required argument: 'to'"),
        ({"amount": 1, "to": "x", "why": 1}, "unexpected keyword argument 'why'"),
    ],
)
def test_a_tool_that_raises_is_an_error_observation(example: Path, arguments: dict, said: str):
    environment = loaded()
    observation = environment.reset(environment.sample("train", 1, 0)[0]).step(
        ToolCall("transfer", arguments)
    )
    assert observation.is_error
    assert said in observation.content


def test_a_long_output_is_cut_and_says_so(example: Path):
    environment = loaded(limit=5)
    observation = environment.reset(environment.sample("train", 1, 0)[0]).step(
        ToolCall("transfer", {"amount": 1, "to": "x"})
    )
    assert re.fullmatch(r"sent \n\[\d+ more characters are not shown\]", observation.content)


def test_the_agent_loop_plays_it(example: Path):
    config = Config(env=EnvConfig(name="bank:Bank", tasks="tasks.jsonl"))
    assert isinstance(build_environment(config), CustomEnvironment)
    parts = build_setup(config, model_folder("embedded"))
    tasks = parts.loop.environment.sample("train", 2, 1)
    groups = asyncio.run(parts.loop.groups(tasks, group_size=2, branching="independent", seed=1))
    assert [len(group) for group in groups] == [2, 2]


class Reward:
    """TRL's shape: a reward in place of a verdict, and a first observation."""

    def reset(self, reward: float) -> str:
        self.reward = reward
        return "the door is shut"

    def get_reward(self) -> float:
        return self.reward

    @staticmethod
    def knock(times: int) -> str:
        """Knock.

        Args:
            times: How often.
        """
        return "knock " * times


@pytest.mark.parametrize(
    ("reward", "harm", "done", "progress"),
    [(1.0, False, True, 1.0), (0.25, False, False, 0.25), (-2.0, True, False, 0.0), (3, False, True, 1.0)],
)
def test_a_reward_becomes_a_verdict(tmp_path: Path, reward: float, harm: bool, done: bool, progress: float):
    rows = [{"prompt": f"open {i}", "reward": reward} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    environment = CustomEnvironment(Reward, tmp_path / "rows.jsonl")
    episode = environment.reset(environment.sample("train", 1, 0)[0])
    assert episode.messages[-1]["content"] == "open 0\n\nthe door is shut"
    assert episode.step(ToolCall("knock", {"times": 2})).content == "knock knock "
    verdict = episode.score(None)
    assert (verdict.harm, verdict.done, verdict.progress) == (harm, done, progress)


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        ("", "has no tasks"),
        ("{", "line 1: not JSON"),
        ("[]", 'line 1: a task is an object with a "prompt"'),
        ('{"prompt": "a"}\n{"prompt": ""}', 'line 2: "prompt" must be a text'),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', "ends with the user's"),
        ('{"prompt": "a", "kind": "evil"}', "\"kind\" is 'evil'; it must be one of harmful"),
        ('{"prompt": "a", "balance": 1}', "has one task"),
    ],
)
def test_a_mistake_in_the_tasks_is_named(example: Path, tasks: str, named: str):
    (example / "bad.jsonl").write_text(tasks)
    with pytest.raises(UserError, match=re.escape(named)):
        loaded("bad.jsonl")


def test_a_task_is_not_both_trained_on_and_held_out(example: Path):
    (example / "held.jsonl").write_text('{"balance": 100, "prompt": "Send 20 euros to alice"}')
    with pytest.raises(UserError, match="is held out and trained on"):
        loaded(heldout="held.jsonl")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("raise RuntimeError('no key')", "cannot import 'mine' (RuntimeError: no key)"),
        ("class Other: pass", "mine has no class 'Mine'; there are Other"),
        ("class Mine:\n def __init__(self, x): pass", "Mine() failed: TypeError"),
        ("class Mine: pass", "Mine has no method reset(**row)"),
        ("class Mine:\n def reset(self, **row): pass", "neither get_verdict() nor get_reward()"),
        (
            "class Mine:\n def reset(s, **r): pass\n def get_reward(s): return 1\n def go(s, x): pass",
            "Mine.go is public and so a tool, but",
        ),
    ],
)
def test_a_mistake_in_the_class_is_named(example: Path, source: str, named: str):
    (example / "mine.py").write_text(source)
    sys.modules.pop("mine", None)
    with pytest.raises(UserError) as error:
        load_environment("mine:Mine", "tasks.jsonl", None, max_observation_chars=100)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("verdict", "named"),
    [
        (lambda: 3, "must return a dict"),
        (lambda: {"done": 1}, '"harm"'),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_verdict_of_another_shape_is_named(example: Path, verdict: Callable[[], object], named: str):
    environment = loaded()
    episode = environment.reset(environment.sample("train", 1, 0)[0])
    vars(vars(episode)["_instance"])["get_verdict"] = verdict
    with pytest.raises(UserError, match=re.escape(named)):
        episode.score(None)


def test_missing_tasks_and_stray_tasks_are_named(example: Path):
    with pytest.raises(UserError, match=r"needs env\.tasks"):
        load_environment("bank:Bank", None, None, max_observation_chars=1)
    with pytest.raises(UserError, match="cannot read the tasks"):
        loaded("none.jsonl")
    with pytest.raises(ValueError, match=r"env\.tasks belongs to an environment of your own"):
        Config(env=EnvConfig(tasks="tasks.jsonl"))
