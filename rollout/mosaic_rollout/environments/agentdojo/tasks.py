"""Which AgentDojo tasks belong to which split, and how they are drawn.

The split divides user tasks and injection tasks separately, a suite at a time. A held-out pair joins a
held-out user task with a held-out injection task, so neither half of it was ever trained on; pairs that mix
the two sides belong to no split.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mosaic_rollout.environments.agentdojo.api import Suite
from mosaic_rollout.environments.attacks import Attack
from mosaic_rollout.environments.sources import payload_as, spread_evenly
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task, TaskKind

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
Pools: TypeAlias = "dict[str, dict[str, tuple[list[str], list[str]]]]"
"""Split -> suite -> (user task ids, injection task ids)."""


@dataclass(frozen=True)
class Payload:
    """Names of what a task is made of."""

    suite: str
    user_task: str
    injection_task: str | None  # None: the user task alone
    attack: Attack | None = None  # None: the environment's


def split_ids(suite: str, ids: Sequence[str], heldout_frac: float) -> dict[Split, list[str]]:
    """Divide a suite's task ids by rank of a fixed hash: exact shares, and at least one id a side.

    >>> split_ids("slack", ["injection_task_1", "injection_task_2", "injection_task_3"], 0.25)["heldout"]
    ['injection_task_3']
    """
    ranked = sorted(ids, key=lambda task: hashlib.sha256(f"{suite}/{task}".encode()).digest())
    count = min(max(1, round(heldout_frac * len(ids))), len(ids) - 1)
    heldout = set(ranked[:count])
    return {"train": [i for i in ids if i not in heldout], "heldout": [i for i in ids if i in heldout]}


def build_pools(
    suites: Mapping[str, Suite], heldout_suites: Mapping[str, Suite], heldout_frac: float
) -> Pools:
    """A split's suites, each with its user task ids and injection task ids.

    Where held-out suites are declared they are the held-out split and `suites` are the training split.
    """
    pools: Pools = {split: {} for split in SPLITS}
    if heldout_suites:
        for split, members in zip(SPLITS, (suites, heldout_suites), strict=True):
            for name, suite in members.items():
                pools[split][name] = (list(suite.user_tasks), list(suite.injection_tasks))
        return pools
    for name, suite in suites.items():
        users = split_ids(name, list(suite.user_tasks), heldout_frac)
        injections = split_ids(name, list(suite.injection_tasks), heldout_frac)
        for split in SPLITS:
            pools[split][name] = (users[split], injections[split])
    return pools


def payloads(pools: Pools, split: str, *, injected: bool) -> dict[str, list[Payload]]:
    """Every payload of one kind in a split, by suite, in AgentDojo's order."""
    if split not in pools:
        raise UserError(f"unknown split {split!r}; AgentDojo has {' and '.join(SPLITS)}")
    return {
        suite: [
            Payload(suite, *pair) for pair in itertools.product(users, injections if injected else [None])
        ]
        for suite, (users, injections) in pools[split].items()
    }


def draw(pools: Pools, split: str, count: int, seed: int, injected_frac: float) -> list[Task]:
    """`count` tasks: kinds spread evenly by `injected_frac`, suites in turn.

    A task comes back only once all of its kind and suite have been drawn.
    """
    rng = random.Random(f"agentdojo/{split}/{seed}")
    decks = [_deal(payloads(pools, split, injected=injected), rng) for injected in (False, True)]
    return [make_task(next(decks[turn]), split) for turn in spread_evenly(injected_frac, count)]


def _deal(pools: Mapping[str, list[Payload]], rng: random.Random) -> Iterator[Payload]:
    """The payloads of several suites, shuffled, one suite after the other, for ever."""
    hands = [itertools.cycle(rng.sample(pool, len(pool))) for pool in pools.values()]
    rng.shuffle(hands)
    return (next(hand) for hand in itertools.cycle(hands))


def make_task(payload: Payload, split: str) -> Task:
    """The task that a payload names."""
    parts = [payload.suite, payload.user_task, *([payload.injection_task] if payload.injection_task else [])]
    kind: TaskKind = "injected" if payload.injection_task else "benign"
    return Task(task_id="/".join(parts), kind=kind, split=split, payload=payload)


def payload_of(task: Task) -> Payload:
    """What a task is made of. Raises TypeError for a task of another environment."""
    return payload_as(task, Payload, "AgentDojo")
