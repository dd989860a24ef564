"""Segments that stand alone, as causal squares stacked into few calls."""

import numpy as np
import torch

from mosaic_kernels.attention.plan.parts import Rows, Stack
from mosaic_kernels.attention.plan.similar import similar
from mosaic_kernels.attention.plan.tree import SegmentTree
from mosaic_kernels.forest import IntArray


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
