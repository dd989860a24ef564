"""What neither trunks nor stacks cover: blocks of queries under a mask, stacked by key count."""

import numpy as np
import torch

from mosaic_kernels.attention.plan.parts import Bucket
from mosaic_kernels.attention.plan.similar import similar
from mosaic_kernels.attention.plan.tree import SegmentTree
from mosaic_kernels.forest import IntArray


def buckets_of(
    segments: SegmentTree,
    subtree_end: IntArray,
    queries: IntArray,
    rows: IntArray,  # of the queries that go into blocks
    positions: IntArray | None,
    window: int | None,
    block: int,
) -> list[Bucket]:
    """Blocks of queries, stacked by key count; a short last block stands alone."""
    if not len(rows):
        return []
    asked = queries[rows]
    owner, nodes = _keys_of_blocks(segments, subtree_end, asked, positions, window, block)
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
    segments: SegmentTree,
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
