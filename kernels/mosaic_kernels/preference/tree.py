"""Which edges of a forest a set of pairs needs, and how rollout tokens map to them. numpy, vectorised."""

from dataclasses import dataclass

import numpy as np

from mosaic_kernels.forest import BoolArray, IntArray, PackedForest


@dataclass(frozen=True)
class NeededEdges:
    """E edges whose log-prob does not cancel in some pair, on N distinct rows of hidden states."""

    rows: IntArray  # [N] packed positions that predict them, rising
    row_of_edge: IntArray  # [E] int in [0, N)
    targets: IntArray  # [E] the token predicted
    edge_of_token: IntArray  # [T] int in [0, E); -1 where the token is untrained or its edge cancels


def needed_edges(forest: PackedForest, pairs: IntArray) -> NeededEdges:  # pairs [P, 2]
    """Edges trained in one rollout of some pair but not in the other.

    Example: rollouts [5, 6, 7] and [5, 6, 8] as one pair need 6 -> 7 and 6 -> 8, both from row 1.
    """
    needed = needed_nodes(forest, pairs)
    edges = np.flatnonzero(needed)
    rows, row_of_edge = np.unique(forest.parent[edges], return_inverse=True)
    edge_of_node = np.where(needed, np.cumsum(needed) - 1, -1)
    edge_of_token = np.where(forest.trained, edge_of_node[forest.node_index], -1)
    return NeededEdges(rows, row_of_edge, forest.tokens[edges], edge_of_token)


def needed_nodes(forest: PackedForest, pairs: IntArray) -> BoolArray:  # [U]
    """True at nodes whose edge some pair needs.

    An edge cancels in every pair if and only if each connected component of the pairs' graph trains it in all
    of its rollouts or in none. So it is enough to count, for each edge and component, who trains it.
    """
    component = _components(forest.num_rollouts, pairs)
    rollout_of = np.repeat(np.arange(forest.num_rollouts), np.diff(forest.cu_seqlens))[forest.trained]
    # A rollout visits a node at most once, so a count of tokens is a count of rollouts.
    key = forest.node_index[forest.trained] * max(forest.num_rollouts, 1) + component[rollout_of]
    visited, count = np.unique(key, return_counts=True)
    node, of = np.divmod(visited, max(forest.num_rollouts, 1))
    size = np.bincount(component, minlength=forest.num_rollouts)
    needed = np.zeros(forest.num_nodes, np.bool_)
    needed[node[count < size[of]]] = True
    return needed


def _components(
    count: int, pairs: IntArray
) -> IntArray:  # [count] the smallest member of each one's component
    """Labels fall to the smallest of a pair, and labels of labels are followed, until nothing changes."""
    label = np.arange(count)
    while True:
        smallest = label.copy()
        low = label[pairs].min(axis=1) if len(pairs) else np.zeros(0, np.int64)
        for column in (0, 1):
            np.minimum.at(smallest, pairs[:, column], low)
            np.minimum.at(smallest, label[pairs[:, column]], low)
        smallest = smallest[smallest]
        if np.array_equal(smallest, label):
            return label
        label = smallest
