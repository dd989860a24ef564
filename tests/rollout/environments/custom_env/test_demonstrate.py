"""A user's `demonstrate`: lists and generators of turns, and what is none."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.environments.custom import CustomEnvironment, given_environment
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.loop.demonstrated import demonstrated
from mosaic_rollout.types import Engine, Environment, Episode, Move, Rollout, Task, ToolCall
from tests.rollout.families_for_tests import FAMILIES
from tests.rollout.scripted import CountingEnvironment

ROWS = [{"prompt": "read 1", "n": 1}, {"prompt": "read 2", "n": 2}]


class Reads:
    """Its tool counts; the task is done once it was read as often as the row says."""

    def reset(self, n: int) -> None:
        self.n, self.reads = n, 0

    def read(self) -> str:
        """Read."""
        self.reads += 1
        return f"read {self.reads}"

    def get_verdict(self) -> dict[str, bool]:
        return {"harm": False, "done": self.reads == self.n}


class Generates(Reads):
    def demonstrate(self, task):
        assert task["prompt"] == f"read {self.n}"
        seen = ""
        while seen != f"read {task['n']}":
            seen = yield {"plan": f"after {seen}", "name": "read"}
        yield Move(answer=seen)


async def as_it_is(episode: Episode, steps: object, move: Move) -> Move:
    return move


def shown(environment: Environment, task: Task | None = None) -> Rollout:
    chat = Chat(FAMILIES["qwen2.5"].tokenizer(), teach_loop=False)
    loop = AgentLoop(cast(Engine, None), chat, environment, Limits(50, 10_000, 10_000))
    task = task or environment.sample("train", 1, 0)[0]
    return asyncio.run(demonstrated(loop, task, environment.reset(task), as_it_is))


def of_class(kind: type, *, rows=ROWS) -> Environment:
    return CustomEnvironment(kind, rows)


def with_moves(given: object) -> Environment:
    kind = type("Shows", (Reads,), {"demonstrate": lambda self, task: given})
    return of_class(kind)


def test_a_generator_is_told_what_follows_each_turn():
    environment = of_class(Generates, rows=[ROWS[1], {"prompt": "read 3", "n": 3}])
    rollout = shown(environment)
    assert [step.plan for step in rollout.steps] == ["after", "after read 1", None]
    assert rollout.verdict.done
    assert rollout.steps[-1].answer == "read 2"


def test_a_list_may_mix_ways_to_write_a_turn():
    rollout = shown(with_moves([ToolCall("read", {}), "done"]))
    assert [(step.action, step.answer) for step in rollout.steps] == [("tool_call", None), ("answer", "done")]
    refused = shown(with_moves([{"check": "risky", "refuse": "no"}]))
    assert (refused.status, refused.steps[0].check) == ("refused", "risky")


def test_a_whole_environment_is_given_the_task():
    class Whole(CountingEnvironment):
        def demonstrate(self, task: Task) -> list[object]:
            return [{"name": "read"}, f"did {task.task_id}"]

    environment = given_environment(Whole())
    assert shown(environment).steps[-1].answer == "did train-0-0"
    with pytest.raises(UserError, match="has no method demonstrate"):
        shown(given_environment(CountingEnvironment()))
    with pytest.raises(UserError, match="counting has no demonstrations"):
        shown(CountingEnvironment())


BAD = {
    "nothing": (None, "must give a list of turns or be a generator"),
    "a key": ([{"tool": "read"}], "a turn is an object with answer, arguments, check"),
    "two actions": ([{"name": "read", "answer": "x"}], "makes one call, or gives one answer"),
    "no action": ([{"plan": "x"}], "makes one call, or gives one answer"),
    "plan": ([{"plan": 3, "answer": "x"}], "makes one call, or gives one answer"),
    "no JSON": ([{"name": "read", "arguments": {"x": float("nan")}}], "the arguments of read are no JSON"),
    "goes on": (["done", "more"], "goes on after the turn that ended its episode"),
    "tags": ([{"plan": "a</think>b", "answer": "x"}], "holds a tag of the loop"),
}


@pytest.mark.parametrize(("given", "said"), BAD.values(), ids=BAD)
def test_what_is_no_demonstration_is_named(given: object, said: str):
    with pytest.raises(UserError) as raised:
        shown(with_moves(given))
    assert said in str(raised.value)


def test_what_it_raises_is_told_with_its_place():
    class Raises(Reads):
        def demonstrate(self, task):
            yield {"name": "read"}
            raise KeyError("gone")

    with pytest.raises(UserError, match=r"Raises\.demonstrate failed: KeyError: 'gone' \(.*test_demonstrate"):
        shown(of_class(Raises))
    with pytest.raises(UserError, match=r"Reads has no method demonstrate\(task\)"):
        shown(of_class(Reads))
