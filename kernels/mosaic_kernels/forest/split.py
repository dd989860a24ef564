"""Cut a forest into parts that fit a token budget, exactly."""

from collections import deque

import numpy as np

from mosaic_kernels.forest.layout import IntArray, PackedForest


def split_forest(forest: PackedForest, max_tokens: int) -> list[PackedForest]:
    """Cut a forest into parts of at most max_tokens packed positions.

    A part is a range [a, b) of the depth-first order, whose edges it owns, behind the ancestors of a,
    which are repeated as context. The cuts minimise the repeated tokens, and the number of parts among
    equals: ranges that start at a run (a node that does not follow its parent) are enough, because moving
    a cut up a first-child path does not change the later part's size and shrinks the earlier part. So the
    best cut is a shortest path over runs, found with a sliding-window minimum. Siblings are never
    reordered.

    A rollout token is trained in the part that owns its node, and nowhere else: sums over trained tokens,
    and their gradients, add up over parts to those of the uncut forest. A rollout appears in full in the
    part that owns its last token; in an earlier part it appears up to its last trained token there, if it
    has one. Empty rollouts appear in no part, unless the forest needs no cut. Part.source [T_part] holds
    the index of each rollout token of the part in the uncut forest.

    ValueError if a rollout alone is longer than max_tokens (it names the budget needed). No rollout
    tokens at all give [].

    Example: [5, 6, 7] and [5, 6, 8] with a budget of 3 become [5, 6, 7] and [5, 6, 8], the second with
    only its last token trained: the first part owns the edge 5 -> 6 for both rollouts, and so it also
    holds the second rollout as [5, 6].
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if forest.num_nodes == 0:
        return []
    depth_needed = int(forest.positions.max()) + 1
    if depth_needed > max_tokens:
        rollout = int(np.diff(forest.cu_seqlens).argmax())
        raise ValueError(
            f"rollout {rollout} has {depth_needed} tokens, more than max_tokens={max_tokens}: "
            f"a rollout is never cut, so the budget must be at least {depth_needed}"
        )
    if forest.num_nodes <= max_tokens:
        bounds = np.array([0, forest.num_nodes])
    else:
        bounds = _cut(forest, max_tokens)
    if len(bounds) == 2:
        source = np.arange(forest.num_tokens)
        return [_with_source(forest, source)]
    return _parts(forest, bounds)


def _with_source(forest: PackedForest, source: IntArray) -> PackedForest:
    outer = source if forest.source is None else forest.source[source]
    return PackedForest(
        forest.tokens, forest.positions, forest.subtree_end, forest.parent,
        forest.node_index, forest.cu_seqlens, forest.trained, outer,
    )  # fmt: skip


def _cut(forest: PackedForest, max_tokens: int) -> IntArray:
    """Bounds [parts + 1] of owned ranges; the part of runs i .. j-1 has start_j - start_i + depth_i nodes.

    start - depth never falls from one run to the next, so the feasible i for a given j are a window.
    """
    starts = np.flatnonzero(forest.parent != np.arange(-1, forest.num_nodes - 1))
    starts = starts if len(starts) and starts[0] == 0 else np.concatenate([[0], starts])
    depths = forest.positions[starts].tolist()
    starts_list = [*starts.tolist(), forest.num_nodes]
    best: list[tuple[int, int]] = [(0, 0)]  # (repeated tokens, parts) of the nodes before run j
    came_from = [0]
    window: deque[tuple[tuple[int, int], int]] = deque()  # increasing cost and index of part starts
    for j in range(1, len(starts_list)):
        i = j - 1
        cost = (best[i][0] + depths[i], best[i][1] + 1)
        while window and window[-1][0] > cost:
            window.pop()
        window.append((cost, i))
        while starts_list[j] - starts_list[window[0][1]] + depths[window[0][1]] > max_tokens:
            window.popleft()
        best.append(window[0][0])
        came_from.append(window[0][1])
    bounds, j = [], len(starts_list) - 1
    while j:
        bounds.append(starts_list[j])
        j = came_from[j]
    return np.array([0, *reversed(bounds)])


def _parts(forest: PackedForest, bounds: IntArray) -> list[PackedForest]:
    """Build the part of each owned range."""
    num_parts = len(bounds) - 1
    rollout_of = np.repeat(np.arange(forest.num_rollouts), np.diff(forest.cu_seqlens))
    owner = np.searchsorted(bounds, forest.node_index, side="right") - 1  # [T], never falls along a rollout
    is_last = np.zeros(forest.num_tokens, np.bool_)
    is_last[forest.cu_seqlens[1:][np.diff(forest.cu_seqlens) > 0] - 1] = True
    # The last token to keep of each (part, rollout): its end, or its last trained token there.
    keep = np.flatnonzero(forest.trained | is_last)
    pair = owner[keep] * forest.num_rollouts + rollout_of[keep]
    order = np.argsort(pair, kind="stable")
    keep, pair = keep[order], pair[order]
    final = np.flatnonzero(np.diff(pair, append=-1) != 0)
    keep, pair = keep[final], pair[final]
    part_of, rollout = np.divmod(pair, forest.num_rollouts)
    edges = np.searchsorted(part_of, np.arange(num_parts + 1))
    return [
        _part(
            forest,
            int(bounds[p]),
            int(bounds[p + 1]),
            rollout[edges[p] : edges[p + 1]],
            keep[edges[p] : edges[p + 1]],
        )
        for p in range(num_parts)
    ]


def _part(forest: PackedForest, a: int, b: int, rollouts: IntArray, last: IntArray) -> PackedForest:
    """The part that owns nodes [a, b), with the given rollouts up to their rollout tokens `last`."""
    depth = int(forest.positions[a])  # the ancestors of a become nodes 0 .. depth-1
    starts = forest.cu_seqlens[rollouts]
    lengths = last + 1 - starts
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    source = np.arange(cu_seqlens[-1]) + np.repeat(starts - cu_seqlens[:-1], lengths)
    nodes = forest.node_index[source]

    through = source[
        np.flatnonzero(nodes == a)[0]
    ]  # a rollout token at node a: its rollout holds a's ancestors
    ancestors = forest.node_index[through - depth : through]
    kept = np.concatenate([ancestors, np.arange(a, b)])
    # A node outside [a, b) on a kept path is an ancestor of a, and its new index is its depth.
    parent = forest.parent[kept]
    renumbered = np.where(parent >= a, parent - a + depth, forest.positions[np.maximum(parent, 0)])
    outer = source if forest.source is None else forest.source[source]
    return PackedForest(
        tokens=forest.tokens[kept],
        positions=forest.positions[kept],
        subtree_end=np.minimum(forest.subtree_end[kept], b) - a + depth,
        parent=np.where(parent < 0, -1, renumbered),
        node_index=np.where(nodes >= a, nodes - a + depth, forest.positions[nodes]),
        cu_seqlens=cu_seqlens,
        trained=forest.trained[source] & (nodes >= a),
        source=outer,
    )
