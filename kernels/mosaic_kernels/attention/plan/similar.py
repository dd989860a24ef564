"""Which calls are worth stacking: those of similar size."""

import numpy as np

from mosaic_kernels.forest import IntArray

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
