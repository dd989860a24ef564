"""A forest taken apart for layers that hand a state from one token to the next.

A segment is a run of nodes between two forks. It begins with the state that the segment above it ended in,
so segments are run level by level, those of one level in a few batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]

_PADDED_PLACES = 256
"""Padded places of a batch that are cheaper than a batch more, whatever their share is."""
_PADDED_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Batch:
    """Segments of one level, padded to the longest."""

    rows: int
    length: int
    above: (
        Tensor  # [rows] int64: which of the level above each hangs below; at the first level its number there
    )


@dataclass(frozen=True, eq=False)
class Segments:
    """P places of nodes in batches. A level counts its segments in the order of its batches.

    Example: [5, 6, 7, 8] and [5, 6, 9] are nodes 5 6 7 8 9 in three segments on two levels: a batch of
    [5 6], and one of [7 8] and [9 -], both below segment 0. `order` is [0, 1, 2, 3, 4, 0], the last place is
    padded, and `places` is [0, 1, 2, 3, 4].
    """

    levels: tuple[tuple[Batch, ...], ...]
    order: Tensor  # [P] int64: the node of each place, batch after batch; 0 at a padded one
    padded: Tensor | None  # [P] bool; None where no place is padded
    places: Tensor  # [U] int64: where each node is
    ends: Tensor  # [segments] int64: where the state of each is among those of all levels
    starts: IntArray  # [segments] first nodes, ascending
    parent: IntArray  # [U] parents, -1 at the first level's first nodes

    @classmethod
    def of(cls, parent: IntArray, device: torch.device, begin: IntArray | None = None) -> Segments:
        """parent: [U] of nodes, each after its parent; -1 at those that have none among them.

        begin: nodes with which a segment begins though no fork is before them.
        """
        count = len(parent)
        children = np.bincount(parent[parent >= 0], minlength=count)
        first = (parent < 0) | (parent != np.arange(count) - 1) | (children[parent] != 1)
        first[[] if begin is None else begin] = True
        starts = np.flatnonzero(first)
        lengths = np.diff(np.append(starts, count))
        first_parent = parent[starts]
        above = np.where(first_parent < 0, -1, np.searchsorted(starts, first_parent, side="right") - 1)
        level = np.zeros(len(starts), np.int64)
        for number, upper in enumerate(above.tolist()):  # those above come first
            level[number] = level[upper] + 1 if upper >= 0 else 0
        rank, places = np.zeros(len(starts), np.int64), np.zeros(count, np.int64)
        above[level == 0] = np.arange(np.count_nonzero(level == 0))
        order: list[IntArray] = []
        padded: list[NDArray[np.bool_]] = []
        levels: list[tuple[Batch, ...]] = []
        offset = 0
        ends = np.zeros(len(starts), np.int64)
        for depth in range(int(level.max()) + 1 if count else 0):
            members = np.flatnonzero(level == depth)
            batches: list[Batch] = []
            ranked = 0
            for chosen in (members[batch] for batch in _batches(lengths[members])):
                longest = int(lengths[chosen[0]])
                nodes = starts[chosen][:, None] + np.arange(longest)
                beyond = np.arange(longest) >= lengths[chosen][:, None]
                places[nodes[~beyond]] = offset + np.flatnonzero(~beyond)
                order.append(np.where(beyond, 0, nodes).ravel())
                padded.append(beyond.ravel())
                upper = rank[above[chosen]] if depth else above[chosen]
                batches.append(Batch(len(chosen), longest, torch.from_numpy(upper).to(device)))
                rank[chosen] = ranked + np.arange(len(chosen))
                ranked += len(chosen)
                offset += nodes.size
            ends[members] = rank[members] + np.count_nonzero(level < depth)
            levels.append(tuple(batches))
        empty = np.zeros(0, np.int64)
        beyond = np.concatenate(padded) if padded else empty.astype(np.bool_)
        return cls(
            tuple(levels),
            torch.from_numpy(np.concatenate(order) if order else empty).to(device),
            torch.from_numpy(beyond).to(device) if beyond.any() else None,
            torch.from_numpy(places).to(device),
            torch.from_numpy(ends).to(device),
            starts,
            parent,
        )

    @cached_property
    def _contexts(self) -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
        return {}

    def context(self, reach: int, fronts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Every segment behind the `reach` tokens before it, in a row: for a causal convolution.

        The columns of the row are those of `fronts` x reach tokens before the first level's segments (of all
        of them, or of each its own), then of the nodes. Returns the column at each place of the row
        [U + segments x reach], each node's place [U], and the last columns of each segment [segments, reach].
        """
        key = reach, fronts
        if key not in self._contexts:
            with torch.inference_mode(False):
                self._contexts[key] = self._context(reach, fronts)
        return self._contexts[key]

    def _context(self, reach: int, fronts: int) -> tuple[Tensor, Tensor, Tensor]:
        shift = fronts * reach
        front = np.zeros(len(self.parent), np.int64)
        roots = np.flatnonzero(self.parent < 0)
        front[roots] = np.arange(len(roots)) if fronts > 1 else 0
        above = np.where(self.parent < 0, (front + 1) * reach - 1, self.parent + shift)
        before = np.append(np.arange(-1, shift - 1), above)
        column = self.starts + shift
        context = np.empty((len(self.starts), reach), np.int64)
        for back in range(reach):
            column = before[column]
            context[:, reach - 1 - back] = column
        nodes = np.arange(len(self.parent))
        segment = np.searchsorted(self.starts, nodes, side="right")
        places = nodes + reach * segment
        row = np.empty(len(nodes) + context.size, np.int64)
        row[places] = nodes + shift
        starts = self.starts + reach * np.arange(len(self.starts))
        row[starts[:, None] + np.arange(reach)] = context
        last = np.append(starts, len(row))[1:, None] + np.arange(-reach, 0)
        row_, places_, last_ = (torch.from_numpy(x).to(self.order.device) for x in (row, places, row[last]))
        return row_, places_, last_


def _batches(lengths: IntArray) -> list[IntArray]:
    """Which segments of a level are run together: by falling length, while little is padded."""
    found: list[list[int]] = []
    longest = tokens = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if found:
            padding = longest * (len(found[-1]) + 1) - tokens - length
            if padding <= max(_PADDED_PLACES, _PADDED_SHARE * tokens):
                found[-1].append(index)
                tokens += length
                continue
        found.append([index])
        longest = tokens = length
    return [np.array(batch) for batch in found]
