"""What `module:name` may name, and what becomes of a module that cannot be imported."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mosaic_fast.config import JudgeConfig
from mosaic_fast.preferences import Judge, build_judge
from mosaic_rollout.environments.custom import load_environment
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign.code import import_named
from mosaic_rollout.types import Observation, Task, ToolCall
from tests.preferences.rollouts import saying


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    for name in ("mine", "own"):  # of another test
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys\nsys.exit(0)", r"SystemExit: 0\) .*mine\.py, line 2\)"),
        ("x = 1\nx.y", r"AttributeError: .*mine\.py, line 2\)"),
        ("def f(:", r"SyntaxError: .*mine\.py, line 1\)"),
        (
            "import no_such_thing",
            r"ModuleNotFoundError: No module named 'no_such_thing'\) .*mine\.py, line 1\)",
        ),
        ("import json\njson.loads('{')", r"JSONDecodeError: .*mine\.py, line 2\)"),
        ("raise BaseException('two\\nlines')", r"BaseException: two lines\) .*mine\.py, line 1\)"),
        (
            "def __getattr__(name):\n    raise KeyError(name)",
            r"cannot be read: KeyError: .*mine\.py, line 2\)",
        ),
        ("class Other: pass", "mine has no class 'Mine'; there are Other"),
        ("Mine = 3", "mine has no class 'Mine'"),
    ],
)
def test_a_module_that_fails_is_one_line_with_its_place(here: Path, source: str, said: str):
    (here / "mine.py").write_text(source)
    with pytest.raises(UserError, match=r"^env\.name 'mine:Mine'.*" + said) as error:
        import_named("mine:Mine", "env.name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["calendar", "json", "types", "queue"])
def test_a_name_of_pythons_own_is_refused(here: Path, name: str):
    (here / f"{name}.py").write_text("class Mine: pass")
    with pytest.raises(UserError, match=rf"{name}\.py has the name of a module of Python itself; rename it"):
        import_named(f"{name}:Mine", "env.name")


def test_a_module_that_prints_is_no_fault(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "mine.py").write_text("print('hello')\nclass Mine: pass")
    assert import_named("mine:Mine", "env.name").__name__ == "Mine"


WHOLE = """
import asyncio
from mosaic_rollout.types import Observation, Task, Verdict

def tool(name):
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}

class Episode:
    def __init__(self, task):
        self.task, self.tools, self.total = task, [tool("add")], 0
        self.messages = [{"role": "user", "content": str(task.payload["start"])}]
    async def step(self, call):
        if call.arguments["n"] == 99:
            raise SystemExit("too much")
        if call.arguments["n"] == 98:
            return "a text"
        self.total += call.arguments.pop("n")
        self.task.payload["start"].append(self.total)
        self.tools = [tool("add"), tool("more")]
        return Observation("")
    async def next_user_message(self, answer):
        return None if answer == "stop" else {"not": "a text"} if answer == "odd" else "go on"
    def score(self, answer):
        import numpy as np
        values = {"nan": np.nan, "none": None}
        return Verdict(np.bool_(False), np.True_, values.get(answer, np.float32(1)))

class Mine:
    name = "mine"
    def __init__(self):
        self.task = Task("t", "benign", "train", {"start": [1]})
    async def sample(self, split, count, seed):
        if split == "heldout":
            return [self.task] * (count + 1)
        return [self.task] * count if seed else ["task"] * count
    def reset(self, task):
        return Episode(task)
"""


def test_a_whole_environment_is_awaited_copied_and_checked(here: Path):
    (here / "mine.py").write_text(WHOLE)
    environment = load_environment("mine:Mine", None, None, max_observation_chars=1000)
    (task,) = environment.sample("train", 1, 1)
    for _ in range(2):
        episode = environment.reset(task)
        assert episode.messages[0]["content"] == "[1]", "the task is as it was"
        call = ToolCall("add", {"n": 2})
        assert episode.step(call) == Observation(""), "an empty text is a text"
        assert call.arguments == {"n": 2}
        assert [tool["function"]["name"] for tool in episode.tools] == ["add", "more"]  # type: ignore[index, call-overload]
        assert "is not of type 'integer'" in episode.step(ToolCall("add", {"n": "2"})).content
        left = episode.step(ToolCall("add", {"n": 99}))
        assert left.is_error
        assert "SystemExit: too much (mine.py, line" in left.content
        verdict = episode.score("x")
        assert (type(verdict.harm), type(verdict.done), type(verdict.progress)) == (bool, bool, float)
        assert episode.next_user_message("hm") == "go on"  # type: ignore[attr-defined]
        assert episode.next_user_message("stop") is None  # type: ignore[attr-defined]
    for answer, said in (("nan", "finite number"), ("none", "finite number")):
        with pytest.raises(UserError, match=said):
            episode.score(answer)
    with pytest.raises(UserError, match="next_user_message must return a text or None"):
        episode.next_user_message("odd")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="step must return an Observation, not 'a text'"):
        episode.step(ToolCall("add", {"n": 98}))
    with pytest.raises(UserError, match="sample gave 3 tasks where 2 were asked for"):
        environment.sample("heldout", 2, 1)
    with pytest.raises(UserError, match="sample must return a list of Task"):
        environment.sample("train", 2, 0)
    assert isinstance(task, Task)


JUDGES = """
import asyncio, sys
import numpy as np
import torch
from mosaic_fast.preferences import Judgement

class Async:
    async def judge(self, groups):
        await asyncio.sleep(0)
        even = [torch.full((len(g), len(g)), 0.5, requires_grad=True) for g in groups]
        return [Judgement(p, {}, {"calls": np.int64(2)}) for p in even]
class AsyncScore:
    async def score_group(self, group):
        return torch.arange(float(len(group)), requires_grad=True)
class Meddling:
    def score_group(self, group):
        for r in group:
            r.token_ids[:] = 0
            r.trained[:] = False
            for step in r.steps:
                if step.call: step.call.arguments.clear()
            for message in r.messages: message.clear()
        return [0] * len(group)
class Leaves:
    def judge(self, groups): sys.exit(0)
class Fails:
    def score_group(self, group): return group[0].no_such_thing
class NoneAtAll:
    def judge(self, groups): return None
class Bare:
    def judge(self, groups): return [np.full((len(g), len(g)), 0.5) for g in groups]
class Ragged:
    def judge(self, groups): return [Judgement([[0.5], [0.5, 0.5]]) for g in groups]
class Words:
    def judge(self, groups): return [Judgement([["a", "b"], ["c", "d"]]) for g in groups]
class BadCount:
    def judge(self, groups): return [Judgement(np.full((2, 2), 0.5), {}, {"n": float("nan")}) for g in groups]
class Infinite:
    def score_group(self, group): return [float("inf"), 1.0]
class Texts:
    def score_group(self, group): return ["1", "2"]
class Huge:
    def score_group(self, group): return [10**400, 1]
class Nested:
    def score_group(self, group): return [[1.0], [2.0]]
class Yielding:
    def score_group(self, group): yield 1.0
"""


@pytest.fixture
def judge(here: Path):
    (here / "own.py").write_text(JUDGES)

    def made(name: str) -> Judge:
        return build_judge(JudgeConfig(name=f"own:{name}"), here)

    return made


@pytest.mark.parametrize("name", ["Async", "AsyncScore"])
def test_an_async_judge_of_tensors_is_awaited_and_plain(judge, name: str):
    (judgement,) = judge(name).judge([[saying("a"), saying("b", 1)]])
    assert type(judgement.preferences) is np.ndarray
    assert judgement.preferences.dtype == np.float64
    assert judgement.preferences[0, 1] == (0.5 if name == "Async" else 0.0)
    assert all(type(value) is float for value in judgement.counts.values())


def test_a_judge_gets_copies(judge):
    group = [saying("a"), saying("b", 1)]
    before = [(r.token_ids.copy(), r.trained.copy(), str(r.messages), str(r.steps)) for r in group]
    judge("Meddling").judge([group])
    for rollout, (ids, trained, messages, steps) in zip(group, before, strict=True):
        assert np.array_equal(rollout.token_ids, ids)
        assert np.array_equal(rollout.trained, trained)
        assert (str(rollout.messages), str(rollout.steps)) == (messages, steps)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Leaves", r"judge failed: SystemExit: 0 \(.*own\.py, line \d+\)"),
        ("Fails", r"score_group failed: AttributeError: .*own\.py, line \d+\)"),
        ("NoneAtAll", "None for 1 groups"),
        ("Bare", "must give a Judgement"),
        ("Ragged", "preferences must be numbers"),
        ("Words", "preferences must be numbers"),
        ("BadCount", '"n" of the counts .* must be a finite number'),
        ("Infinite", "want one number for each of 2 rollouts, each finite"),
        ("Texts", "want one number"),
        ("Huge", "want one number"),
        ("Nested", "want one number"),
        ("Yielding", "gave a generator"),
    ],
)
def test_what_a_judge_may_not_give_is_refused(judge, name: str, said: str):
    with pytest.raises(UserError, match=said) as error:
        judge(name).judge([[saying("a"), saying("b", 1)]])
    assert "\n" not in str(error.value)
