"""What covers a forest: calls of the fused kernel as indices of rows and nodes, and how they are found.

A plan (`attention/plan.py`) consists of causal squares and full rectangles over contiguous nodes, of squares
of similar length stacked into one call, and of blocks of queries under a mask, stacked by key count.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from mosaic_kernels.forest.layout import BoolArray, IntArray

CACHED_BIAS = 2**23  # mask entries a plan may keep as floats between calls (32 MiB in fp32)


@dataclass(frozen=True, eq=False)
class Depths:
    """Where nodes lie, and how deep a query may lie to see them, for windows and chunks."""

    of_node: IntArray  # [U]
    limit: IntArray  # [U] the first depth that no longer sees the node


Rows = torch.Tensor | slice
"""Indices [N] int64, or consecutive ones: a slice, with which nothing is copied."""


@dataclass(frozen=True)
class Part:
    """A call on contiguous rows of q and contiguous nodes: a causal square, or a full rectangle."""

    rows: slice  # of q
    keys: slice  # nodes


@dataclass(frozen=True, eq=False)
class Context:
    """The ancestors of a trunk that lie outside trunks: a full rectangle over gathered keys."""

    rows: slice  # of q
    keys: torch.Tensor  # [C] int64 nodes


@dataclass(frozen=True, eq=False)
class Stack:
    """Causal squares of similar size in one call. Padding repeats a square's last node, after all others."""

    squares: int  # N
    rows: Rows  # [N * L] of q
    keys: Rows  # [N * L] nodes
    real: torch.Tensor | None  # [number of real ones] int64 among N * L; None: all


@dataclass(frozen=True, eq=False)
class Bucket:
    """Blocks stacked into one call."""

    blocks: int  # N
    queries: torch.Tensor  # [N * B] int64 rows of q
    keys: torch.Tensor  # [N * K] int64 nodes; padding repeats a node and is hidden
    hidden: torch.Tensor  # [N, 1, B, K] bool, True where the query does not see the key


@dataclass(frozen=True, eq=False)
class Plan:
    """Index arrays of one forest, shared by all layers.

    Squares, stacks and buckets hold every row once; rectangles and contexts are merged into them.
    """

    squares: tuple[Part, ...] = ()
    rectangles: tuple[Part, ...] = ()
    contexts: tuple[Context, ...] = ()
    stacks: tuple[Stack, ...] = ()
    buckets: tuple[Bucket, ...] = ()
    _biases: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict, repr=False)

    def bias(self, bucket: int, dtype: torch.dtype) -> torch.Tensor:
        """The mask of a bucket as [N, 1, B, K]: 0 where visible, -inf where hidden."""
        key = (bucket, dtype)
        if key in self._biases:
            return self._biases[key]
        hidden = self.buckets[bucket].hidden
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        if sum(one.numel() for one in self._biases.values()) + bias.numel() <= CACHED_BIAS:
            self._biases[key] = bias
        return bias


SIMILAR = 0.85  # blocks or squares of at least this share of the largest one's size are stacked


def similar(sizes: IntArray) -> list[IntArray]:
    """Groups of indices with similar sizes, the largest first."""
    order = np.argsort(-sizes, kind="stable")  # of equal ones, the first comes first: they stay consecutive
    ordered = sizes[order].tolist()
    groups, first = [], 0
    for index in range(1, len(ordered) + 1):
        if index == len(ordered) or ordered[index] < SIMILAR * ordered[first]:
            groups.append(order[first:index])
            first = index
    return groups


SHARED_TRUNK = 32  # tokens from which a segment is a trunk, where
SHARED_PAIRS = 4096  # they make so many pairs with nodes that descend from them


class SegmentTree:
    """The segments of a forest, cut also where queries begin and end, and the tree they form."""

    def __init__(self, subtree_end: IntArray, queries: IntArray, trunk: int) -> None:
        asked = np.zeros(len(subtree_end), np.bool_)
        asked[queries] = True
        changes = (np.diff(subtree_end) != 0) | (asked[1:] != asked[:-1])
        self.stop = np.append(np.flatnonzero(changes) + 1, len(subtree_end))  # [S]
        self.start = np.append(0, self.stop[:-1])  # [S]
        length = self.stop - self.start
        pairs = length * (subtree_end[self.start] - self.stop)  # [S] below the causal square
        shared = (length >= min(trunk, SHARED_TRUNK)) & (pairs >= SHARED_PAIRS)
        self.is_trunk: BoolArray = (length >= trunk) | shared  # [S]
        self.is_leaf: BoolArray = pairs == 0  # [S] nothing descends from it
        self.is_asked: BoolArray = asked[self.start]  # [S]
        self.of_node = np.repeat(np.arange(len(self.start)), self.stop - self.start)  # [U]
        self.parent = np.empty(len(self.start), np.int64)  # [S] -1 at a root
        path: list[tuple[int, int]] = []  # (subtree end, segment) from a root to the last segment seen
        ends = subtree_end[self.start].tolist()
        for segment, (start, end) in enumerate(zip(self.start.tolist(), ends, strict=True)):
            while path and path[-1][0] <= start:
                path.pop()
            self.parent[segment] = path[-1][1] if path else -1
            path.append((end, segment))

    def same_ends(self, longest: int) -> IntArray:
        """Trunks that nothing descends from, with trunks alone above them, as long as another one of these.

        They are worth one call together, as other segments that stand alone are.
        """
        length = self.stop - self.start
        ends = np.flatnonzero(self.is_trunk & self.is_leaf & (length <= longest))
        owner, _ = self.ancestors_outside_trunks(self.start[ends])
        ends = np.delete(ends, np.unique(owner))
        _, kind, count = np.unique(length[ends], return_inverse=True, return_counts=True)
        return ends[count[kind] > 1]

    def stand_alone(self, shortest: int) -> BoolArray:  # [S]
        """Segments that are asked for, are no trunk, and have only trunks above them."""
        long = self.stop - self.start >= shortest
        candidates = np.flatnonzero(self.is_asked & ~self.is_trunk & long)
        owner, _ = self.ancestors_outside_trunks(self.start[candidates])
        alone = np.zeros(len(self.start), np.bool_)
        alone[candidates] = True
        alone[candidates[np.unique(owner)]] = False
        return alone

    def ancestors_outside_trunks(self, nodes: IntArray) -> tuple[IntArray, IntArray]:
        """(index into nodes, ancestor) of all ancestors outside trunks, grouped by the index.

        All nodes climb together, one segment a turn.
        """
        owners, starts, stops = [], [], []
        index, segment, stop = np.arange(len(nodes)), self.of_node[nodes], nodes
        while len(index):
            kept = ~self.is_trunk[segment]
            owners.append(index[kept])
            starts.append(self.start[segment[kept]])
            stops.append(stop[kept])
            above = self.parent[segment]
            index, segment = index[above >= 0], above[above >= 0]
            stop = self.stop[segment]
        if not owners:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        owner, start, count = (np.concatenate(owners), np.concatenate(starts), np.concatenate(stops))
        count = count - start
        order = np.argsort(owner, kind="stable")
        owner, start, count = owner[order], start[order], count[order]
        first = np.cumsum(count) - count
        return np.repeat(owner, count), np.arange(count.sum()) + np.repeat(start - first, count)


def stacks_of(segments: SegmentTree, queries: IntArray, alone: IntArray) -> list[Stack]:
    """The given segments as causal squares, those of similar length stacked."""
    length = segments.stop[alone] - segments.start[alone]
    stacks = []
    for group in similar(length):
        longest = int(length[group].max())
        column = np.arange(longest)
        real = column < length[group][:, None]
        keys = segments.start[alone[group]][:, None] + np.minimum(column, length[group][:, None] - 1)
        rows = np.searchsorted(queries, keys)
        stacks.append(
            Stack(
                squares=len(group),
                rows=_as_rows(rows.reshape(-1)),
                keys=_as_rows(keys.reshape(-1)),
                real=None if real.all() else torch.from_numpy(np.flatnonzero(real)),
            )
        )
    return stacks


def _as_rows(index: IntArray) -> Rows:
    """A slice where that says the same."""
    first, count = int(index[0]), len(index)
    consecutive = int(index[-1]) - first + 1 == count and bool((np.diff(index) == 1).all())
    return slice(first, first + count) if consecutive else torch.from_numpy(index)


def buckets_of(
    segments: SegmentTree,
    subtree_end: IntArray,
    queries: IntArray,
    rows: IntArray,  # of the queries that go into blocks
    depths: Depths | None,
    block: int,
) -> list[Bucket]:
    """Blocks of queries, stacked by key count; a short last block stands alone."""
    if not len(rows):
        return []
    asked = queries[rows]
    owner, nodes = _keys_of_blocks(segments, subtree_end, asked, depths, block)
    count = np.bincount(owner)  # [blocks] keys of each block
    offset = np.cumsum(count) - count
    buckets = []
    full = len(rows) // block
    groups = similar(count[:full])
    if full < len(count):
        groups.append(np.array([full]))
    for group in groups:
        column = np.arange(count[group].max())
        exists = column < count[group][:, None]
        keys = nodes[np.where(exists, offset[group][:, None] + column, 0)]
        width = min(block, len(rows) - int(group[0]) * block)
        chosen = group[:, None] * block + np.arange(width)
        q, k = asked[chosen][:, :, None], keys[:, None, :]
        visible = exists[:, None, :] & (k <= q) & (q < subtree_end[keys][:, None, :])
        if depths is not None:
            visible &= depths.of_node[q] < depths.limit[k]
        buckets.append(
            Bucket(
                blocks=len(group),
                queries=torch.from_numpy(rows[chosen].reshape(-1)),
                keys=torch.from_numpy(keys.reshape(-1)),
                hidden=torch.from_numpy(~visible)[:, None],
            )
        )
    return buckets


def _keys_of_blocks(
    segments: SegmentTree,
    subtree_end: IntArray,
    asked: IntArray,  # [Q] rising nodes outside trunks
    depths: Depths | None,
    block: int,
) -> tuple[IntArray, IntArray]:
    """(block, node) of all keys outside trunks that some query of the block sees, grouped by block.

    They are the ancestors of its first query, and from there on nodes above one of its queries.
    """
    firsts = asked[::block]
    owner, nodes = segments.ancestors_outside_trunks(firsts)
    if depths is not None:
        # A later query of the block may lie on a shallower branch than the first one, and reach further up.
        lowest = np.minimum.reduceat(depths.of_node[asked], np.arange(0, len(asked), block))
        reachable = lowest[owner] < depths.limit[nodes]
        owner, nodes = owner[reachable], nodes[reachable]
    rest = np.flatnonzero(~segments.is_trunk[segments.of_node])
    rest = rest[(rest >= firsts[0]) & (rest <= asked[-1])]
    following = np.searchsorted(asked, rest)  # the first query at or after the node
    block_of = np.searchsorted(firsts, rest, side="right") - 1
    needed = (asked[following] < subtree_end[rest]) & (following // block == block_of)
    owner, nodes = np.append(owner, block_of[needed]), np.append(nodes, rest[needed])
    order = np.argsort(owner, kind="stable")
    return owner[order], nodes[order]
