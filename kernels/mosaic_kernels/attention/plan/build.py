"""How `segments` covers the visible (query, key) pairs of a forest with a few large attention calls.

A segment is a maximal chain of nodes with the same descendants: consecutive equal subtree_end. Segments
that are long, or shared by many descendants, are trunks. They need no mask and no copy of keys: causal
squares over themselves and a full rectangle for the block of nodes that descend from them. Other segments
right below trunks or roots are causal squares too: similar ones are padded and stacked into one call. What
remains of the forest is cut into blocks of BLOCK queries, each with the union of its queries' keys outside
trunks under a mask, stacked by key count. So the number of calls does not grow with the number of nodes,
however small the rollouts.

Where outputs of some nodes only are asked for, segments are cut where these begin and end too.

Example: a trunk of 600 tokens with 32 branches of 30 becomes four causal squares of 150 and three rectangles
between them, one 960 x 600 rectangle, and one stack of 32 causal squares of 30.
"""

import numpy as np
import torch

from mosaic_kernels.attention.plan.buckets import buckets_of
from mosaic_kernels.attention.plan.parts import Context, Part, Plan
from mosaic_kernels.attention.plan.stacks import stacks_of
from mosaic_kernels.attention.plan.tree import SegmentTree
from mosaic_kernels.forest import IntArray

BLOCK = 64  # queries a block: larger wastes masked pairs, smaller copies more keys
TRUNK = 128  # tokens from which a segment is worth calls of its own
STACKED = 16  # tokens from which shorter segments are stacked: below, blocks hold several of them
SQUARE = 256  # a causal square above is halved: the fused kernel computes hidden pairs along the diagonal


def build_plan(
    subtree_end: IntArray,  # [U]
    positions: IntArray | None = None,  # [U]
    window: int | None = None,
    queries: IntArray | None = None,  # [Uq] rising nodes; None: all
    *,
    block: int = BLOCK,
    trunk: int = TRUNK,
    square: int = SQUARE,
    stacked: int = STACKED,
) -> Plan:
    """Cover a forest. With a window everything is a block: squares would need masks."""
    nodes = np.arange(len(subtree_end)) if queries is None else queries
    if not len(nodes):
        return Plan()
    segments = SegmentTree(subtree_end, nodes, trunk)
    if window is not None:
        segments.is_trunk[:] = False
    else:
        segments.is_trunk[segments.same_ends(square)] = False
    squares, rectangles, contexts = [], [], []
    trunks = np.flatnonzero(segments.is_trunk)
    owner, above = segments.ancestors_outside_trunks(segments.start[trunks])
    for index, segment in enumerate(trunks.tolist()):
        start, stop = int(segments.start[segment]), int(segments.stop[segment])
        first, past, last = np.searchsorted(nodes, [start, stop, subtree_end[start]]).tolist()
        if first < past:
            _halve(Part(slice(first, past), slice(start, stop)), square, squares, rectangles)
            if (owner == index).any():
                contexts.append(Context(slice(first, past), torch.from_numpy(above[owner == index])))
        if past < last:
            rectangles.append(Part(slice(past, last), slice(start, stop)))
    alone = np.zeros(len(segments.start), np.bool_)
    if window is None:
        alone = segments.stand_alone(stacked)
    in_block = ~(segments.is_trunk | alone)[segments.of_node[nodes]]
    return Plan(
        tuple(squares),
        tuple(rectangles),
        tuple(contexts),
        tuple(stacks_of(segments, nodes, np.flatnonzero(alone))),
        tuple(buckets_of(segments, subtree_end, nodes, np.flatnonzero(in_block), positions, window, block)),
    )


def _halve(whole: Part, square: int, squares: list[Part], rectangles: list[Part]) -> None:
    """Cover a causal square by smaller ones and the rectangles between them."""
    size = whole.rows.stop - whole.rows.start
    if size <= square:
        squares.append(whole)
        return
    row, key = whole.rows.start + size // 2, whole.keys.start + size // 2
    upper = Part(slice(whole.rows.start, row), slice(whole.keys.start, key))
    lower = Part(slice(row, whole.rows.stop), slice(key, whole.keys.stop))
    _halve(upper, square, squares, rectangles)
    _halve(lower, square, squares, rectangles)
    rectangles.append(Part(lower.rows, upper.keys))
