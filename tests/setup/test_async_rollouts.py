"""Rollouts ahead: how old they may be, that nothing mixes, and that what goes wrong is heard of."""

import re
import threading

import pytest

from mosaic_fast.config import Config
from mosaic_fast.setup.async_rollouts import AsyncRollouts

HANGS_S = 60.0


class World:
    """Remembers by which weights each step was played, and refuses what would mix two policies."""

    def __init__(self, staleness: int, steps: int, *, meet: bool = False) -> None:
        """meet: every step but the first is played until the trainer trains, which waits for it."""
        self.version, self.weights, self.busy, self.meet = -1, 0, False, meet
        self.overlapped, self.met = 0, threading.Event()
        self.training = threading.Event()
        self.ahead = AsyncRollouts(self.publish, self.play, max_staleness=staleness, steps=steps)

    def publish(self, version: int) -> None:
        assert not self.busy, "published while the engine was sampling"
        assert not self.training.is_set(), "published while the weights were changing"
        assert version == self.weights
        self.version = version

    def play(self, step: int) -> tuple[int, int]:
        self.busy = True
        if self.meet and step:
            self.overlapped += self.training.wait(HANGS_S)
            self.met.set()
        self.busy = False
        return step, self.version

    def train(self, *, last: bool = False) -> None:
        self.training.set()
        if self.meet and not last:
            assert self.met.wait(HANGS_S)
            self.met.clear()
        self.weights += 1
        self.training.clear()


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_steps_come_in_order_and_are_never_older_than_allowed(staleness: int):
    steps = 9
    world = World(staleness, steps)
    ages = []
    for step in range(steps):
        played, version = world.ahead.take(step)
        assert played == step
        ages.append(step - version)
        world.train()
    world.ahead.close()
    assert max(ages) == staleness
    assert ages[0] == 0


def test_without_staleness_every_step_is_on_policy_and_nothing_runs_beside_training():
    world = World(0, 3)
    for step in range(3):
        assert world.ahead.take(step) == (step, step)
        assert not world.busy
        world.train()


def test_sampling_ahead_runs_while_the_trainer_trains():
    world = World(1, 4, meet=True)
    for step in range(4):
        world.ahead.take(step)
        world.train(last=step == 3)
    world.ahead.close()
    assert world.overlapped == 3


def test_a_resumed_run_begins_on_policy():
    world = World(2, 10)
    world.weights = 6
    assert world.ahead.take(6) == (6, 6)
    world.ahead.close()


def test_what_playing_raised_is_raised_where_the_step_is_taken():
    def play(step: int) -> int:
        if step == 2:
            raise OSError("the engine is gone")
        return step

    ahead = AsyncRollouts(lambda version: None, play, max_staleness=2, steps=9)
    assert [ahead.take(0), ahead.take(1)] == [0, 1]
    with pytest.raises(OSError, match="the engine is gone"):
        ahead.take(2)
    ahead.close()


def test_wait_leaves_the_engine_idle_and_keeps_what_was_played():
    world = World(2, 9)
    world.ahead.take(0)
    world.ahead.wait()
    assert not world.busy
    assert world.ahead.take(1) == (1, 0)
    world.ahead.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rollout": {"max_staleness": 1}}, "needs engine.kind = 'sglang'"),
        (
            {"rollout": {"max_staleness": 1}, "engine": {"kind": "sglang", "colocated": True}},
            "servers that are not colocated",
        ),
        ({"rollout": {"max_staleness": 1}, "engine": {"kind": "sglang"}}, "off_policy.truncate_at"),
    ],
)
def test_what_staleness_needs_is_named(change: dict, named: str):
    with pytest.raises(ValueError, match=re.escape(named)):
        Config.model_validate(change)
