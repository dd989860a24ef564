"""gate_contrast: a trunk's decision to check is taken both ways, and the other side is drawn by rejection."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.loop.agent_loop import REDRAWS, AgentLoop, Limits
from mosaic_rollout.types import Completion, Request, Rollout
from tests.rollout.scripted import CountingEnvironment, ScriptedEngine, call
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)


class GateEngine(ScriptedEngine):
    """Opens the gate at its first `openings` draws after a plan, then does not."""

    def __init__(self, chat: Chat, openings: int) -> None:
        super().__init__(chat, self._say)
        self.left = openings
        self.seeds: list[int] = []

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.seeds += [request.seed for request in requests]
        return await super().generate(requests)

    def _say(self, text: str, key: int) -> str:
        _, planned, rest = text.partition("</think>")
        if not planned:
            return "<think>plan</think>done"
        if rest:
            return "fine</safety_thoughts>done"
        self.left -= 1
        return "<safety_thoughts>fine</safety_thoughts>done" if self.left >= 0 else "done"


def play(engine: ScriptedEngine, group_size: int = 4) -> list[Rollout]:
    loop = AgentLoop(engine, engine.chat, CountingEnvironment(), Limits(3, 200, 3000))
    tasks = loop.environment.sample("train", 1, 0)
    [group] = asyncio.run(
        loop.groups(tasks, group_size=group_size, branching="fork_at_check", seed=5, gate_contrast=True)
    )
    return group


def begins_with_tag(rollout: Rollout) -> bool:
    assert rollout.gate is not None
    start, tag = rollout.gate.position, rollout.gate.tag
    return tuple(rollout.token_ids[start : start + len(tag)].tolist()) == tag


def test_one_trunk_of_four_and_both_sides_of_its_gate(chat: Chat):
    group = play(GateEngine(chat, openings=0))
    gate = group[0].gate
    assert gate is not None
    assert [rollout.parent_id for rollout in group] == [None, 0, 0, 0]
    assert [rollout.gate.opened for rollout in group if rollout.gate] == [False, True, False, True]
    for rollout in group:
        assert rollout.gate is not None
        assert replace(rollout.gate, opened=False) == replace(gate, opened=False)
        assert rollout.gate.opened == begins_with_tag(rollout)
        at = rollout.gate.position
        np.testing.assert_array_equal(rollout.token_ids[:at], group[0].token_ids[:at])
        assert rollout.trained[at : at + len(rollout.gate.tag)].all()
        assert (rollout.steps[0].check is not None) == rollout.gate.opened
        assert rollout.status == "answered"


def test_a_skip_is_drawn_again_while_it_opens_with_another_seed_each_time(chat: Chat):
    engine = GateEngine(chat, openings=3)
    group = play(engine)
    assert [rollout.gate.opened for rollout in group if rollout.gate] == [False, True, False, True]
    assert engine.left < 0
    assert len(set(engine.seeds)) == 4, "three draws were thrown away"


def test_a_gate_that_never_closes_keeps_its_last_draw_and_says_so(chat: Chat):
    engine = GateEngine(chat, openings=10**9)
    group = play(engine)
    assert [rollout.gate.opened for rollout in group if rollout.gate] == [False, True, True, True]
    assert len(set(engine.seeds)) == REDRAWS
    assert all(rollout.status == "answered" for rollout in group)


def test_eight_rollouts_have_two_trunks_with_a_gate_each(chat: Chat):
    group = play(GateEngine(chat, openings=0), group_size=8)
    assert [rollout.parent_id for rollout in group] == [None, None, 0, 1, 0, 1, 0, 1]
    sides = [(rollout.gate.trunk_id, rollout.gate.opened) for rollout in group if rollout.gate]
    for trunk in (0, 1):
        assert sides.count((trunk, True)) == sides.count((trunk, False)) == 2


def test_a_trunk_without_a_plan_has_no_gate(chat: Chat):
    def say(text: str, key: int) -> str:
        return "done" if "read 1" in text else call("read")

    group = play(ScriptedEngine(chat, say))
    assert [rollout.gate for rollout in group] == [None] * 4
