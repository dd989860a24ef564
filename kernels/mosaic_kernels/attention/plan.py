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
    """A long segment: a causal square, a full rectangle for its descendants, and its own ancestors."""

    start: int
    stop: int
    end: int  # nodes [stop, end) descend from it
    context: torch.Tensor | None  # [C] int64: its ancestors outside trunks


@dataclass(frozen=True, eq=False)
class Bucket:
    """Blocks stacked into one call."""

    blocks: int  # N
    queries: torch.Tensor  # [N * B] int64 nodes
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


def plan_for(subtree_end: torch.Tensor, positions: torch.Tensor | None, window: int | None) -> Plan:
    """The plan of a forest, from a small cache keyed by content: layers and passes share it.

    A window that no path exceeds changes nothing, and is dropped.
    """
    if window is None or positions is None or not positions.numel() or int(positions.max()) < window:
        return _cached_plan(subtree_end.numpy().tobytes(), None, None)
    return _cached_plan(subtree_end.numpy().tobytes(), positions.numpy().tobytes(), window)


@functools.lru_cache(maxsize=8)
def _cached_plan(subtree_end: bytes, positions: bytes | None, window: int | None) -> Plan:
    depth = None if positions is None else np.frombuffer(positions, np.int64)
    return build_plan(np.frombuffer(subtree_end, np.int64), depth, window)


def build_plan(
    subtree_end: IntArray,  # [U]
    positions: IntArray | None = None,  # [U]
    window: int | None = None,
    *,
    block: int = BLOCK,
    trunk: int = TRUNK,
) -> Plan:
    """Trunks and buckets of a forest. With a window everything is a block: squares would need masks."""
    if not len(subtree_end):
        return Plan((), ())
    segments = _Segments(subtree_end, trunk)
    if window is not None:
        segments.is_trunk[:] = False
    trunks = np.flatnonzero(segments.is_trunk)
    owner, nodes = segments.ancestors_outside_trunks(segments.start[trunks])
    made = []
    for index, segment in enumerate(trunks.tolist()):
        context = nodes[owner == index]
        made.append(
            Trunk(
                start=int(segments.start[segment]),
                stop=int(segments.stop[segment]),
                end=int(subtree_end[segments.start[segment]]),
                context=torch.from_numpy(context) if len(context) else None,
            )
        )
    return Plan(tuple(made), tuple(_buckets(segments, subtree_end, positions, window, block)))


class _Segments:
    """The segments of a forest and the tree they form."""

    def __init__(self, subtree_end: IntArray, trunk: int) -> None:
        self.stop = np.append(np.flatnonzero(np.diff(subtree_end)) + 1, len(subtree_end))  # [S]
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
    segments: _Segments, subtree_end: IntArray, positions: IntArray | None, window: int | None, block: int
) -> list[Bucket]:
    """Blocks of the forest without its trunks, stacked by key count; a short last block stands alone."""
    rest = np.flatnonzero(~segments.is_trunk[segments.of_node])
    if not len(rest):
        return []
    firsts = rest[::block]
    owner, nodes = segments.ancestors_outside_trunks(firsts)
    if window is not None and positions is not None:
        # A later query of the block may lie on a shallower branch than the first one, and reach further up.
        lowest = np.minimum.reduceat(positions[rest], np.arange(0, len(rest), block))
        reachable = lowest[owner] - positions[nodes] < window
        owner, nodes = owner[reachable], nodes[reachable]
    count = np.bincount(owner, minlength=len(firsts))  # [blocks] ancestors of each block's first query
    offset = np.cumsum(count) - count
    nodes = np.append(nodes, 0)  # a node to point at for padding, also where there are no ancestors

    buckets = []
    for group in _similar(count, block, len(rest) // block):
        column = np.arange(count[group].max())
        real = column < count[group][:, None]
        ancestors = nodes[np.where(real, offset[group][:, None] + column, len(nodes) - 1)]
        width = min(block, len(rest) - int(group[0]) * block)
        queries = rest[group[:, None] * block + np.arange(width)]
        keys = np.concatenate([ancestors, queries], axis=1)
        exists = np.concatenate([real, np.ones_like(queries, np.bool_)], axis=1)
        q, k = queries[:, :, None], keys[:, None, :]
        visible = exists[:, None, :] & (k <= q) & (q < subtree_end[keys][:, None, :])
        if window is not None and positions is not None:
            visible &= positions[q] - positions[k] < window
        buckets.append(
            Bucket(
                blocks=len(group),
                queries=torch.from_numpy(queries.reshape(-1)),
                keys=torch.from_numpy(keys.reshape(-1)),
                hidden=torch.from_numpy(~visible)[:, None],
            )
        )
    return buckets


def _similar(count: IntArray, block: int, full: int) -> list[IntArray]:
    """Groups of block indices with similar key count among the first `full` blocks, then the short one."""
    order = np.argsort(-count[:full], kind="stable")
    sizes = (count[order] + block).tolist()
    groups, first = [], 0
    for index in range(1, full + 1):
        if index == full or sizes[index] < SIMILAR * sizes[first]:
            groups.append(order[first:index])
            first = index
    if full < len(count):
        groups.append(np.array([full]))
    return groups
