"""A fork goes on from tokens that its own episode would have given as well, or it is no fork."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from mosaic_fast.distributed.exchange import packed, unpacked
from mosaic_fast.run.metrics import rollout_figures
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.loop.agent_loop import AgentLoop, Branching, Limits
from mosaic_rollout.types import Observation, Rollout, Task, ToolCall, ToolSchema
from tests.rollout.scripted import CountingEpisode, ScriptedEngine, call
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer

LIMITS = Limits(max_steps=5, max_step_tokens=300, max_rollout_tokens=8000)


class Changing(CountingEpisode):
    """What one episode shows differs from the next one's, in the way and from the call on that `how` says."""

    def __init__(self, how: str, number: int) -> None:
        super().__init__()
        self.how, self.number = how, number
        if how == "opening":
            self.messages = [{"role": "user", "content": f"it is {number} o'clock, go"}]
        if how == "tools":
            self.tools = [*self.tools, _tool(f"tool{number}")]

    def step(self, call: ToolCall) -> Observation:
        seen = super().step(call)
        if self.how == "first" or (self.how == "second" and self.reads == 2):
            return Observation(f"{seen.content}, seen at {self.number}")
        if self.how == "new tool" and self.reads == 1:
            self.tools = [*self.tools, _tool(f"tool{self.number}")]
        if self.how == "error":
            return Observation(seen.content if self.number % 2 else "Error: too busy", bool(self.number % 2))
        return seen


def _tool(name: str) -> ToolSchema:
    function = {"name": name, "description": name, "parameters": {"type": "object"}}
    return {"type": "function", "function": function}


class Environment:
    """Keeps the episodes it opened."""

    name = "changing"

    def __init__(self, how: str) -> None:
        self.how, self.numbers = how, itertools.count()
        self.opened: list[Changing] = []

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        return [Task(f"{split}-{i}", "benign", split) for i in range(count)]

    def reset(self, task: Task) -> Changing:
        self.opened.append(Changing(self.how, next(self.numbers)))
        return self.opened[-1]


def _reads_twice(text: str, key: int) -> str:
    reads = text.count("<|im_start|>tool\n")
    if reads >= 2:
        return "<think>end</think>All done."
    return f"<think>look</think><safety_thoughts>ok</safety_thoughts>{call('read', number=str(reads))}"


def play(how: str, branching: Branching, seed: int, *, gate_contrast: bool = False) -> list[Rollout]:
    chat = Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)
    environment = Environment(how)
    loop = AgentLoop(ScriptedEngine(chat, _reads_twice), chat, environment, LIMITS)
    work = loop.groups(
        environment.sample("train", 1, 0),
        group_size=8,
        branching=branching,
        seed=seed,
        gate_contrast=gate_contrast,
    )
    return asyncio.run(work)[0]


def _shown(rollout: Rollout) -> Iterator[str]:
    return (step.observation for step in rollout.steps if step.observation is not None)


@pytest.mark.parametrize("branching", ["fork_at_check", "fork_at_step"])
@pytest.mark.parametrize("how", ["opening", "tools", "first", "second", "new tool"])
def test_a_fork_of_another_world_is_played_anew(how: str, branching: Branching):
    group = play(how, branching, 1)
    assert [r.rollout_id for r in group] == list(range(8)), "the group keeps its size and its order"
    assert any(r.fork_refused for r in group)
    assert rollout_figures(group)["rollout/forks_refused"] == sum(r.fork_refused for r in group)
    for rollout in group:
        assert rollout.trained.any()
        if rollout.fork_refused:
            assert (rollout.parent_id, rollout.fork_position, rollout.gate) == (None, None, None)
        if rollout.parent_id is not None and rollout.fork_position is not None:
            before = [step for step in rollout.steps if step.end < rollout.fork_position]
            assert how not in ("opening", "tools")
            assert len(before) < (2 if how == "second" else 1), "nothing inherited tells of another world"
            trunk = group[rollout.parent_id]
            inherited = rollout.token_ids[: rollout.fork_position]
            assert np.array_equal(inherited, trunk.token_ids[: rollout.fork_position])
    if how == "first":
        numbers = [{text.rpartition(" ")[2] for text in _shown(r)} for r in group]
        assert all(len(found) == 1 for found in numbers), "each rollout tells of one episode only"


@pytest.mark.parametrize("branching", ["fork_at_check", "fork_at_step"])
def test_a_world_that_repeats_itself_is_forked(branching: Branching):
    group = play("", branching, 0)
    assert sum(r.parent_id is not None for r in group) == 4
    assert rollout_figures(group)["rollout/forks_refused"] == 0


def test_both_sides_of_a_gate_are_of_one_world():
    for how in ("first", "opening"):
        group = play(how, "fork_at_check", 1, gate_contrast=True)
        assert all(r.gate is None for r in group if r.fork_refused)


def test_refusals_and_errors_are_told_between_ranks():
    rollout = play("first", "fork_at_step", 2)[-1]
    again = unpacked(packed(rollout), rollout.task)
    assert (again.fork_refused, again.tool_errors) == (rollout.fork_refused, rollout.tool_errors)


def test_calls_that_come_back_as_errors_are_counted():
    group = play("error", "independent", 0)
    calls = len(group[0].steps) - 1
    assert [r.tool_errors for r in group] == [0, calls] * 4
    assert rollout_figures(group)["env/tool_errors"] == calls / 2
