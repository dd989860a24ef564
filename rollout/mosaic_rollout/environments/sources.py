"""Where tasks come from, and which of them are held out.

Benchmarks are installed packages in the one known version, and files that a user brings; either is named
where it is missing or does not fit. Tasks with one `leak key` (the same scenario, the same request) are never
divided between the splits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task

Payload = TypeVar("Payload")


class EnvironmentMissing(UserError):
    """A benchmark's package is not installed, or not in the version its adapter was written for."""


def require_package(name: str, known_version: str, install_hint: str) -> None:
    """Raise EnvironmentMissing unless the package is installed in exactly `known_version`.

    install_hint: what the user runs to have it, in the imperative.
    """
    try:
        installed = version(name)
    except PackageNotFoundError:
        raise EnvironmentMissing(f"the package {name} is not installed; {install_hint}") from None
    if installed != known_version:
        raise EnvironmentMissing(
            f"{name} {installed} is installed, but its insides are used and only {known_version} is known to "
            f"fit; {install_hint}"
        )


def read_json_file(path: Path) -> object:
    """What a JSON file holds, after a byte order mark or none. UserError where it cannot be read as such."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_json_list(path: Path, what: str) -> list[object]:
    """The entries of a JSON file that is one list. UserError says `what` it must be where it is none."""
    found = read_json_file(path)
    if not isinstance(found, list) or not found:
        raise UserError(f"{path} holds no list of cases; it must be {what}")
    return found


def text_at(entry: Mapping[str, object], key: str, where: str) -> str:
    """A text that an entry must have. UserError says where it is missing or empty."""
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f'{where}: there is no "{key}"')
    return value


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def payload_as(task: Task, kind: type[Payload], environment: str) -> Payload:
    """What an environment's task is made of. TypeError for a task of another environment."""
    if not isinstance(task.payload, kind):
        raise TypeError(f"{task.task_id} is not a task of {environment}")
    return task.payload


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


def spread_evenly(share: float, count: int) -> list[bool]:
    """Which of `count` draws are of the kind that has this share of them.

    >>> spread_evenly(0.4, 5)
    [False, False, True, False, True]
    """
    return [int((i + 1) * share) > int(i * share) for i in range(count)]


def text_key(text: str) -> str:
    """A leak key of a text: letters and digits only, so that spelling variants of one request share it."""
    return "".join(character for character in text.lower() if character.isalnum())


def _rank(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
