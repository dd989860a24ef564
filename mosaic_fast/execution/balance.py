"""A step's rollouts over the ranks, so that the ranks' passes are predicted to take the same time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mosaic_fast.policy.forest_tensors import IntArray
from mosaic_kernels import PackedForest, pack_forest


def shares(forest: PackedForest, node_cost: NDArray[np.float64], ranks: int) -> list[IntArray]:
    """The rollouts of each rank, by index; empty ones are nobody's.

    Rollouts stay in depth-first order, and a rank gets a run of them: neighbours share the most. A run costs
    its first rollout whole, and of each one after it what it does not share with the one before. The dearest
    run is as cheap as this order allows.

    node_cost: [U] what each node adds to a rank that has it.

    Example: [5, 6, 7], [5, 6, 8] and [9, 9, 9] on two ranks, each node 1: [0, 1] costs 4, and [2] costs 3.
    """
    bounds, index = forest.cu_seqlens, forest.node_index
    filled = np.flatnonzero(np.diff(bounds) > 0)
    order = filled[np.argsort(index[bounds[filled + 1] - 1], kind="stable")]
    if not len(order):
        return [order] * ranks
    ahead = np.append(0.0, np.cumsum(node_cost[index]))  # what the tokens before each one cost
    whole = ahead[bounds[order + 1]] - ahead[bounds[order]]
    added = whole.copy()
    for number, (before, rollout) in enumerate(pairwise(order.tolist()), 1):
        path = index[bounds[rollout] : bounds[rollout + 1]]
        shared = int(np.searchsorted(path, index[bounds[before + 1] - 1], side="right"))
        added[number] = ahead[bounds[rollout + 1]] - ahead[bounds[rollout] + shared]
    low, high = float(whole.max()), float(whole[0] + added[1:].sum())
    starts = _runs(whole, added, high)
    for _ in range(60):  # halving: as exact as the costs are
        if high <= low:
            break
        middle = (low + high) / 2
        tried = _runs(whole, added, middle)
        if len(tried) <= ranks:
            starts, high = tried, middle
        else:
            low = middle
    ends = [*starts[1:], len(order)]
    found = [np.sort(order[start:end]) for start, end in zip(starts, ends, strict=True)]
    return found + [order[:0]] * (ranks - len(found))


def share_of(forest: PackedForest, rollouts: IntArray) -> PackedForest:
    """The forest of some rollouts; its `source` is the index of each of their tokens in the whole one."""
    bounds = forest.cu_seqlens
    spans = [np.arange(bounds[r], bounds[r + 1]) for r in rollouts.tolist()]
    source = np.concatenate(spans) if spans else np.zeros(0, np.int64)
    tokens = forest.tokens[forest.node_index]
    packed = pack_forest([tokens[span] for span in spans], [forest.trained[span] for span in spans])
    outer = source if forest.source is None else forest.source[source]
    return replace(packed, source=outer)


def _runs(whole: NDArray[np.float64], added: NDArray[np.float64], most: float) -> list[int]:
    """Where runs begin that cost `most` each or less, as long as that allows."""
    starts, cost = [0], float(whole[0])
    for number in range(1, len(whole)):
        cost += float(added[number])
        if cost > most:
            starts.append(number)
            cost = float(whole[number])
    return starts
