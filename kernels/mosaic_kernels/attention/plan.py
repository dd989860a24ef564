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

A plan is made once for all layers and passes, and lives as long as the forest's tensor does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mosaic_kernels.attention.blocks import first_blind_depth
from mosaic_kernels.attention.plan_parts import (
    Context,
    Depths,
    Part,
    Plan,
    SegmentTree,
    buckets_of,
    stacks_of,
)
from mosaic_kernels.forest.layout import IntArray

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
    chunk: int | None = None,
    block: int = BLOCK,
    trunk: int = TRUNK,
    square: int = SQUARE,
    stacked: int = STACKED,
) -> Plan:
    """Cover a forest. With a window or chunks everything is a block: squares would need masks."""
    nodes = np.arange(len(subtree_end)) if queries is None else queries
    if not len(nodes):
        return Plan()
    segments = SegmentTree(subtree_end, nodes, trunk)
    depths = None
    if positions is not None and (window, chunk) != (None, None):
        depths = Depths(positions, first_blind_depth(positions, window, chunk))
    if depths is not None:
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
    if depths is None:
        alone = segments.stand_alone(stacked)
    in_block = ~(segments.is_trunk | alone)[segments.of_node[nodes]]
    return Plan(
        tuple(squares),
        tuple(rectangles),
        tuple(contexts),
        tuple(stacks_of(segments, nodes, np.flatnonzero(alone))),
        tuple(buckets_of(segments, subtree_end, nodes, np.flatnonzero(in_block), depths, block)),
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


PLANS_OF_A_FOREST = 8  # kept: all nodes or some of them, with each window of the model's layers


def plan_for(
    subtree_end: torch.Tensor,
    positions: torch.Tensor | None,
    window: int | None,
    queries: torch.Tensor | None = None,
    chunk: int | None = None,
) -> Plan:
    """The plan of a forest, made once for all layers and passes.

    It lives as long as the tensor `subtree_end` does; calls that make a new tensor each time find the plans
    of the last few forests by their content. A window or a chunk that no path exceeds changes nothing, and is
    dropped.
    """
    size = window or chunk
    if size is None or positions is None or not positions.numel() or int(positions.max()) < size:
        positions = window = chunk = None
    arrays = (subtree_end, positions, queries)
    contents = (None if x is None else x.numpy().tobytes() for x in arrays)
    if any(x is not None and x.is_inference() for x in arrays):  # such a tensor does not count its changes
        return _cached_plan(*contents, window, chunk)
    versions = tuple(None if x is None else x._version for x in arrays)
    known = _PLANS.setdefault(subtree_end, [])
    for one in known:
        same = one.positions is positions and one.queries is queries
        if same and one.versions == versions and one.reach == (window, chunk):
            return one.plan
    plan = _cached_plan(*contents, window, chunk)
    known.append(_Known(versions, positions, queries, (window, chunk), plan))
    del known[:-PLANS_OF_A_FOREST]
    return plan


@dataclass(frozen=True, eq=False)
class _Known:
    """A plan and the tensors it was made for, which are compared by identity and version."""

    versions: tuple[int | None, ...]
    positions: torch.Tensor | None
    queries: torch.Tensor | None
    reach: tuple[int | None, int | None]  # window, chunk
    plan: Plan


_PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # subtree_end -> list[_Known]


@functools.lru_cache(maxsize=8)
def _cached_plan(
    subtree_end: bytes, positions: bytes | None, queries: bytes | None, window: int | None, chunk: int | None
) -> Plan:
    end, depth, rows = (
        None if x is None else np.frombuffer(x, np.int64) for x in (subtree_end, positions, queries)
    )
    assert end is not None
    return build_plan(end, depth, window, rows, chunk=chunk)
