"""The attacker of a training run: what it picks, what it remembers, and how it goes on from a checkpoint."""

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_fast.config import Config
from mosaic_fast.errors import UserError
from mosaic_fast.setup.attacker import AttackCounts, Attacker, Pull, build_attacker
from mosaic_rollout.environments.attacks import Attack
from mosaic_rollout.environments.world import WorldEnvironment
from mosaic_rollout.types import Rollout, Task
from tests.report.runs_for_tests import make_rollout

WORLD = WorldEnvironment()
NAMES = WORLD.attacks("train")[:6]
PULLS = st.lists(
    st.builds(Pull, st.integers(0, 6), st.sampled_from(NAMES), st.sampled_from([0.0, 0.25, 1.0])), max_size=20
)


def attacker(**changed: Any) -> Attacker:
    settings: dict[str, Any] = {"seed": 3, "bandit": True, "memory": 0.9} | changed
    return Attacker(WORLD, [Attack(name) for name in NAMES], **settings)


def groups(tasks: list[Task], obeyed: dict[str, float], rng: random.Random) -> list[list[Rollout]]:
    """Four rollouts of each task, that obey an attack with its probability."""
    rollout = make_rollout(kind="injected")
    found = []
    for task in tasks:
        share = obeyed.get(task.attack or "", 0.0)
        verdicts = [replace(rollout.verdict, harm=rng.random() < share) for _ in range(4)]
        found.append([replace(rollout, task=task, verdict=verdict) for verdict in verdicts])
    return found


def picks(who: Attacker, counts: AttackCounts, first: int, steps: int, obeyed: dict[str, float]):
    """What is picked in some steps by a policy that obeys in this way, and the counts after it."""
    picked, rng = Counter[str](), random.Random(first)
    for step in range(first, first + steps):
        tasks = who.attacked(WORLD.sample("train", 12, step), step, counts)
        picked.update(task.attack for task in tasks if task.attack)
        counts = who.observed(counts, step, groups(tasks, obeyed, rng))
    return picked, counts


def test_what_succeeds_is_picked_and_what_no_longer_does_is_forgotten():
    """The policy learns to resist the first attack and begins to obey another: the picks move there."""
    picked, counts = picks(attacker(), AttackCounts(), 0, 40, {NAMES[0]: 0.9, NAMES[1]: 0.1})
    assert picked[NAMES[0]] > 0.6 * picked.total()
    later, _ = picks(attacker(), counts, 40, 60, {NAMES[2]: 0.9})
    assert later.most_common(1)[0][0] == NAMES[2]
    assert later[NAMES[0]] < 0.25 * later.total()
    uniform, _ = picks(attacker(bandit=False), AttackCounts(), 0, 40, {NAMES[0]: 0.9})
    assert max(uniform.values()) < 0.3 * uniform.total()


@given(pulls=PULLS, cut=st.integers(0, 7), memory=st.sampled_from([0.3, 0.9, 1.0]))
def test_counts_of_a_checkpoint_are_those_of_an_undisturbed_run(pulls: list[Pull], cut: int, memory: float):
    """To the bit, wherever the run was stopped."""
    counts = AttackCounts(pending=tuple(pulls))
    kept = AttackCounts.of_json(json.loads(json.dumps(counts.until(cut, memory).as_json())))
    assert kept.until(7, memory) == counts.until(7, memory)


@given(ahead=st.integers(1, 3), step=st.integers(0, 6), pulls=PULLS)
def test_steps_that_are_sampled_ahead_look_at_nothing_that_comes_later(
    ahead: int, step: int, pulls: list[Pull]
):
    """Whether the thread that samples comes before the trainer or after it, it picks the same."""
    who, tasks = attacker(ahead=ahead), WORLD.sample("train", 6, 1)
    known = AttackCounts(pending=tuple(pull for pull in pulls if pull.step < step - ahead))
    late = AttackCounts(pending=tuple(pull for pull in pulls if pull.step < step))
    assert who.attacked(tasks, step, known) == who.attacked(tasks, step, late)


def test_only_orders_change_and_the_task_stays():
    before = WORLD.sample("train", 6, 1)
    after = attacker().attacked(before, 0, AttackCounts())
    assert [task.task_id for task in after] == [task.task_id for task in before]
    for old, new in zip(before, after, strict=True):
        assert (new == old) == (old.kind != "injected")
        assert WORLD.reset(new).messages == WORLD.reset(old).messages


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"pick": "bandit", "names": ["system: first"]},
            "has no attack 'system: first' of its training split",
        ),
        ({"pick": "uniform", "file": "nowhere.txt"}, "cannot read the attacks of nowhere.txt"),
    ],
)
def test_attacks_that_do_not_fit_are_named(settings: dict[str, object], named: str):
    config = Config.model_validate({"attacks": settings})
    with pytest.raises(UserError, match=named):
        build_attacker(config, WORLD)


def test_an_environment_without_orders_is_named():
    config = Config.model_validate({"attacks": {"pick": "bandit"}})
    with pytest.raises(UserError, match="has no injected order"):
        build_attacker(config, cast(Any, object()))
