"""The segments of a forest, and the tree they form.

A segment is a maximal chain of nodes with the same descendants: consecutive equal subtree_end.
"""

import numpy as np

from mosaic_kernels.forest import BoolArray, IntArray

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
