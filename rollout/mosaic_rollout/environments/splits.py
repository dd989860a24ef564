"""Which tasks are trained on and which are held out, and how either are drawn.

Tasks with one `leak key` (the same scenario, the same request) are never divided between the splits.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task

Item = TypeVar("Item")

SPLITS = ("train", "heldout")


def divide(
    train: Sequence[Item],
    heldout: Sequence[Item] | None,
    leak_key: Callable[[Item], str],
    heldout_frac: float,
) -> dict[str, list[Item]]:
    """The items of either split.

    train: candidates for training. heldout: candidates for the held-out split, declared by the user; None:
    the same candidates. A leak key found among both kinds of candidates is held out where its rank by a fixed
    hash is within `heldout_frac` of them, else trained on; its items on the other side are dropped. At least
    one key goes each way. UserError where a side stays empty.

    >>> divide(["a1", "a2", "b1"], None, lambda item: item[0], 0.5)
    {'train': ['a1', 'a2'], 'heldout': ['b1']}
    """
    candidates = train if heldout is None else heldout
    keys = {leak_key(item) for item in train}
    shared = sorted(keys & {leak_key(item) for item in candidates}, key=_rank)
    count = min(max(1, round(heldout_frac * len(shared))), max(len(shared) - 1, 0))
    held, trained = set(shared[:count]), set(shared[count:])
    split = {
        "train": [item for item in train if leak_key(item) not in held],
        "heldout": [item for item in candidates if leak_key(item) not in trained],
    }
    for name, items in split.items():
        if not items:
            raise UserError(f"the {name} split has no task; name more suites, or others")
    return split


def draw(pools: Mapping[str, Sequence[Task]], split: str, count: int, seed: int) -> list[Task]:
    """`count` tasks of a split's pool, a pure function of its arguments; repeats once all have been drawn."""
    if split not in pools:
        raise UserError(f"unknown split {split!r}; there are {' and '.join(pools)}")
    return list(itertools.islice(deal(pools[split], random.Random(f"{split}/{seed}")), count))


def deal(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """The items in random order, for ever; shuffled again each time they are used up."""
    while items:
        yield from rng.sample(items, len(items))


def text_key(text: str) -> str:
    """A leak key of a text: letters and digits only, so that spelling variants of one request share it."""
    return "".join(character for character in text.lower() if character.isalnum())


def _rank(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
