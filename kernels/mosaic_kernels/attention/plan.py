"""How `segments` covers the visible (query, key) pairs of a forest with a few large attention calls.

A segment is a maximal chain of nodes with the same descendants: consecutive equal subtree_end. Long
segments, the trunks, need no mask and no copy of keys: a causal square over themselves and a full
rectangle for the block of nodes that descend from them. What remains of the forest when trunks are taken
out is again a forest in depth-first order; it is cut into blocks of BLOCK queries, each with the union of
its queries' keys (the ancestors of the first one, and the block itself) under a mask. Blocks of similar
key count are padded and stacked into one call. So the number of calls does not grow with the number of
nodes, however small the rollouts.

Example: a trunk of 600 tokens with 32 branches of 30 becomes one 600 x 600 causal square, one 960 x 600
rectangle, and 15 blocks of 64 queries in two or three stacked calls.
"""

import functools
from dataclasses import dataclass, field

import numpy as np
import torch

from mosaic_kernels.forest import BoolArray, IntArray

BLOCK = 64  # queries a block: larger wastes masked pairs, smaller copies more keys
TRUNK = 128  # tokens from which a segment is worth calls of its own
SIMILAR = 0.85  # blocks whose key count is at least this share of the largest one's are stacked
CACHED_BIAS = 2**23  # mask entries a plan may keep as floats between calls (32 MiB in fp32)


@dataclass(frozen=True, eq=False)
class Trunk:
    """A long segment: a causal square, a full rectangle for its descendants, and its own ancestors.

    Rows are rows of q. Those of a trunk's own nodes are all there or none of them is.
    """

    keys: slice  # its nodes
    own: slice  # rows at its nodes
    below: slice  # rows at its descendants
    context: torch.Tensor | None  # [C] int64: its ancestors outside trunks


@dataclass(frozen=True, eq=False)
class Bucket:
    """Blocks stacked into one call."""

    blocks: int  # N
    queries: torch.Tensor  # [N * B] int64 rows of q
    keys: torch.Tensor  # [N * K] int64 nodes; padding repeats node 0 and is hidden
    hidden: torch.Tensor  # [N, 1, B, K] bool, True where the query does not see the key


@dataclass(frozen=True, eq=False)
class Plan:
    """Index arrays of one forest, shared by all layers."""

    trunks: tuple[Trunk, ...]
    buckets: tuple[Bucket, ...]
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


def plan_for(
    subtree_end: torch.Tensor,
    positions: torch.Tensor | None,
    window: int | None,
    queries: torch.Tensor | None = None,
) -> Plan:
    """The plan of a forest, from a small cache keyed by content: layers and passes share it.

    A window that no path exceeds changes nothing, and is dropped.
    """
    if window is None or positions is None or not positions.numel() or int(positions.max()) < window:
        positions = window = None
    arrays = (None if x is None else x.numpy().tobytes() for x in (subtree_end, positions, queries))
    return _cached_plan(*arrays, window)


@functools.lru_cache(maxsize=8)
def _cached_plan(
    subtree_end: bytes, positions: bytes | None, queries: bytes | None, window: int | None
) -> Plan:
    end, depth, rows = (
        None if x is None else np.frombuffer(x, np.int64) for x in (subtree_end, positions, queries)
    )
    assert end is not None
    return build_plan(end, depth, window, rows)


def build_plan(
    subtree_end: IntArray,  # [U]
    positions: IntArray | None = None,  # [U]
    window: int | None = None,
    queries: IntArray | None = None,  # [Uq] rising nodes; None: all
    *,
    block: int = BLOCK,
    trunk: int = TRUNK,
) -> Plan:
    """Trunks and buckets of a forest. With a window everything is a block: squares would need masks."""
    nodes = np.arange(len(subtree_end)) if queries is None else queries
    if not len(nodes):
        return Plan((), ())
    segments = _Segments(subtree_end, nodes, trunk)
    if window is not None:
        segments.is_trunk[:] = False
    trunks = np.flatnonzero(segments.is_trunk)
    owner, above = segments.ancestors_outside_trunks(segments.start[trunks])
    made = []
    for index, segment in enumerate(trunks.tolist()):
        start, stop = int(segments.start[segment]), int(segments.stop[segment])
        first, past, last = np.searchsorted(nodes, [start, stop, subtree_end[start]]).tolist()
        context = above[owner == index]
        made.append(
            Trunk(
                keys=slice(start, stop),
                own=slice(first, past),
                below=slice(past, last),
                context=torch.from_numpy(context) if len(context) else None,
            )
        )
    return Plan(tuple(made), tuple(_buckets(segments, subtree_end, nodes, positions, window, block)))


class _Segments:
    """The segments of a forest, cut also where queries begin and end, and the tree they form."""

    def __init__(self, subtree_end: IntArray, queries: IntArray, trunk: int) -> None:
        asked = np.zeros(len(subtree_end), np.bool_)
        asked[queries] = True
        changes = (np.diff(subtree_end) != 0) | (asked[1:] != asked[:-1])
        self.stop = np.append(np.flatnonzero(changes) + 1, len(subtree_end))  # [S]
        self.start = np.append(0, self.stop[:-1])  # [S]
        self.is_trunk: BoolArray = self.stop - self.start >= trunk  # [S]
        self.of_node = np.repeat(np.arange(len(self.start)), self.stop - self.start)  # [U]
        self.parent = np.empty(len(self.start), np.int64)  # [S] -1 at a root
        path: list[tuple[int, int]] = []  # (subtree end, segment) from a root to the last segment seen
        ends = subtree_end[self.start].tolist()
        for segment, (start, end) in enumerate(zip(self.start.tolist(), ends, strict=True)):
            while path and path[-1][0] <= start:
                path.pop()
            self.parent[segment] = path[-1][1] if path else -1
            path.append((end, segment))

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


def _buckets(
    segments: _Segments,
    subtree_end: IntArray,
    queries: IntArray,
    positions: IntArray | None,
    window: int | None,
    block: int,
) -> list[Bucket]:
    """Blocks of the queries outside trunks, stacked by key count; a short last block stands alone."""
    rows = np.flatnonzero(~segments.is_trunk[segments.of_node[queries]])
    if not len(rows):
        return []
    asked = queries[rows]
    owner, nodes = _keys_of_blocks(segments, subtree_end, asked, positions, window, block)
    count = np.bincount(owner)  # [blocks] keys of each block
    offset = np.cumsum(count) - count
    buckets = []
    for group in _similar(count, len(rows) // block):
        column = np.arange(count[group].max())
        exists = column < count[group][:, None]
        keys = nodes[np.where(exists, offset[group][:, None] + column, 0)]
        width = min(block, len(rows) - int(group[0]) * block)
        chosen = group[:, None] * block + np.arange(width)
        q, k = asked[chosen][:, :, None], keys[:, None, :]
        visible = exists[:, None, :] & (k <= q) & (q < subtree_end[keys][:, None, :])
        if window is not None and positions is not None:
            visible &= positions[q] - positions[k] < window
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
    segments: _Segments,
    subtree_end: IntArray,
    asked: IntArray,  # [Q] rising nodes outside trunks
    positions: IntArray | None,
    window: int | None,
    block: int,
) -> tuple[IntArray, IntArray]:
    """(block, node) of all keys outside trunks that some query of the block sees, grouped by block.

    They are the ancestors of its first query, and from there on nodes above one of its queries.
    """
    firsts = asked[::block]
    owner, nodes = segments.ancestors_outside_trunks(firsts)
    if window is not None and positions is not None:
        # A later query of the block may lie on a shallower branch than the first one, and reach further up.
        lowest = np.minimum.reduceat(positions[asked], np.arange(0, len(asked), block))
        reachable = lowest[owner] - positions[nodes] < window
        owner, nodes = owner[reachable], nodes[reachable]
    rest = np.flatnonzero(~segments.is_trunk[segments.of_node])
    rest = rest[(rest >= firsts[0]) & (rest <= asked[-1])]
    following = np.searchsorted(asked, rest)  # the first query at or after the node
    block_of = np.searchsorted(firsts, rest, side="right") - 1
    needed = (asked[following] < subtree_end[rest]) & (following // block == block_of)
    owner, nodes = np.append(owner, block_of[needed]), np.append(nodes, rest[needed])
    order = np.argsort(owner, kind="stable")
    return owner[order], nodes[order]


def _similar(count: IntArray, full: int) -> list[IntArray]:
    """Groups of block indices with similar key count among the first `full` blocks, then the short one."""
    order = np.argsort(-count[:full], kind="stable")
    sizes = count[order].tolist()
    groups, first = [], 0
    for index in range(1, full + 1):
        if index == full or sizes[index] < SIMILAR * sizes[first]:
            groups.append(order[first:index])
            first = index
    if full < len(count):
        groups.append(np.array([full]))
    return groups
