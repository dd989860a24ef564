"""The ways to run a forest under a token budget: which forwards, of which nodes, on whose keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mosaic_fast.policy.forest_tensors import IntArray
from mosaic_kernels import PackedForest, split_forest
from mosaic_kernels.forest.ideal import predicting

PLANS = ("tree", "flat", "cut", "kept")


@dataclass(frozen=True, eq=False)
class Forward:
    """One forward over nodes of a forest; it owns the trained edges that leave these nodes.

    `parent` is an earlier forward of the schedule whose keys and values, with those of its own parents, this
    one attends to: together they are the path above the nodes. The schedule is in depth-first order, so at
    any time the forwards that are held are one path.
    """

    forest: PackedForest
    nodes: IntArray | None = None  # [U] rising; None: all
    parent: int = -1
    kept: bool = False  # whether others stand on it

    @property
    def num_nodes(self) -> int:
        return self.forest.num_nodes if self.nodes is None else len(self.nodes)

    @property
    def owned_tokens(self) -> IntArray:  # indices among the schedule's T rollout tokens
        """The trained rollout tokens whose log-probs it gives: those that its nodes predict."""
        forest, tokens = self.forest, np.flatnonzero(self.forest.trained)
        if self.nodes is not None:
            here = np.zeros(forest.num_nodes, np.bool_)
            here[self.nodes] = True
            tokens = tokens[here[forest.parent[forest.node_index[tokens]]]]
        return tokens if forest.source is None else forest.source[tokens]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The forwards of a forest, decided once a step and used by every pass over it.

    On one of several ranks the parts are those of its share; what they own is counted in the whole forest.
    """

    forest: PackedForest
    parts: tuple[Forward, ...]
    plan: str  # of PLANS
    predicted_s: dict[str, float]  # a forward and backward pass, for each plan that was possible
    idle: int = 0  # forwards that other ranks run beyond the parts here

    @property
    def packed_tokens(self) -> int:
        """Positions forwarded by one pass, repeated context included."""
        return sum(part.num_nodes for part in self.parts)

    def only(self, indices: Iterable[int]) -> Schedule:
        """The forwards at these indices and those that they stand on, in their order."""
        wanted: set[int] = set()
        for index in indices:
            while index >= 0 and index not in wanted:
                wanted.add(index)
                index = self.parts[index].parent
        kept = sorted(wanted)
        place = {-1: -1, **{index: number for number, index in enumerate(kept)}}
        parts = [self.parts[index] for index in kept]
        below = {part.parent for part in parts}
        moved = [
            replace(part, parent=place[part.parent], kept=part.kept and index in below)
            for index, part in zip(kept, parts, strict=True)
        ]
        return replace(self, parts=tuple(moved))


def whole(forest: PackedForest) -> tuple[Forward, ...]:
    """The plan `tree`: the whole forest in one forward; none where nothing is trained."""
    return (Forward(forest),) if forest.trained.any() else ()


def cut(forest: PackedForest, max_tokens: int) -> tuple[Forward, ...]:
    """The plan `cut`: parts that repeat the context they need.

    ValueError names a rollout that is longer than the budget.
    """
    return tuple(Forward(part) for part in split_forest(forest, max_tokens) if part.trained.any())


def unmerged(forest: PackedForest) -> PackedForest:
    """The same rollouts, nothing shared: each is a tree of its own, in the order given."""
    lengths = np.diff(forest.cu_seqlens)
    parent = np.arange(forest.num_tokens) - 1
    parent[forest.cu_seqlens[:-1][lengths > 0]] = -1
    return PackedForest(
        tokens=forest.tokens[forest.node_index],
        positions=forest.positions[forest.node_index],
        subtree_end=np.repeat(forest.cu_seqlens[1:], lengths),
        parent=parent,
        node_index=np.arange(forest.num_tokens),
        cu_seqlens=forest.cu_seqlens,
        trained=forest.trained,
        source=forest.source,
    )


def hold(forest: PackedForest, max_tokens: int) -> tuple[Forward, ...]:
    """The plan `kept`: every node in one forward only. All forwards on a path together fit the budget.

    Sibling subtrees that fit beside what is held above them are packed together. Of one that does not fit,
    the chain down to its first fork is held for what is below it. Needs a budget of the longest rollout.

    Example: a prompt of 1,500 with three branches of 400 and a budget of 2,000 becomes four forwards: the
    prompt, which is held, and each branch; cut with repetition they would forward the prompt three times.
    """
    end = forest.subtree_end
    made: list[Forward] = []
    levels = [_Level(_siblings(end, 0, forest.num_nodes), parent=-1, room=max_tokens)]
    while levels:
        level = levels[-1]
        node = next(level.siblings, None)
        if node is None:
            level.flush(forest, made)
            levels.pop()
            continue
        stop = int(end[node])
        if stop - node <= level.room:
            if level.size + stop - node > level.room:
                level.flush(forest, made)
            level.taken.append((node, stop))
            level.size += stop - node
            continue
        fork = node + int((end[node:stop] != stop).argmax())  # the chain's descendants all end where it does
        made.append(Forward(forest, np.arange(node, fork), level.parent))
        below = _siblings(end, fork, stop)
        levels.append(_Level(below, parent=len(made) - 1, room=level.room - (fork - node)))
    return _needed(forest, made)


class _Level:
    """Sibling subtrees below a kept prefix: those taken for the next forward, and those still to come."""

    def __init__(self, siblings: Iterator[int], parent: int, room: int) -> None:
        self.siblings, self.parent, self.room = siblings, parent, room
        self.taken: list[tuple[int, int]] = []
        self.size = 0

    def flush(self, forest: PackedForest, made: list[Forward]) -> None:
        if self.taken:
            nodes = np.concatenate([np.arange(start, stop) for start, stop in self.taken])
            made.append(Forward(forest, nodes, self.parent))
            self.taken, self.size = [], 0


def _siblings(end: IntArray, first: int, stop: int) -> Iterator[int]:
    node = first
    while node < stop:
        yield node
        node = int(end[node])


def _needed(forest: PackedForest, made: list[Forward]) -> tuple[Forward, ...]:
    """Drop the forwards that own no trained edge and on which no other stands; renumber the parents."""
    owns = predicting(forest)
    kept = [False] * len(made)
    wanted = [False] * len(made)
    for index in reversed(range(len(made))):
        wanted[index] = kept[index] or bool(owns[made[index].nodes].any())
        if wanted[index] and made[index].parent >= 0:
            kept[made[index].parent] = True
    number = np.cumsum(wanted) - 1
    return tuple(
        replace(one, parent=int(number[one.parent]) if one.parent >= 0 else -1, kept=kept[index])
        for index, one in enumerate(made)
        if wanted[index]
    )
