"""Which edges of a forest a set of pairs needs, and how rollout tokens map to them. numpy, vectorised.

Preference losses in plain PyTorch autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mosaic_kernels.dispatch import result_dtype
from mosaic_kernels.fixed_order import add_up
from mosaic_kernels.forest.layout import BoolArray, IntArray, PackedForest
from mosaic_kernels.logprob import linear_logprob


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
    # Where no rollout visits a node twice, a count of tokens is a count of rollouts.
    key = forest.node_index[forest.trained] * max(forest.num_rollouts, 1) + component[rollout_of]
    visited, count = np.unique(key, return_counts=True)
    node, of = np.divmod(visited, max(forest.num_rollouts, 1))
    size = np.bincount(component, minlength=forest.num_rollouts)
    needed = np.zeros(forest.num_nodes, np.bool_)
    needed[node[count < size[of]]] = True
    # One of several sequences may: then it is left in, whatever the others do.
    visits = np.stack([forest.node_index[forest.trained], rollout_of])
    pairs_seen, times = np.unique(visits, axis=1, return_counts=True)
    needed[pairs_seen[0, times > 1]] = True
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


def reference_pairwise_preference_loss(
    policy_logprobs: torch.Tensor,  # [T]
    reference_logprobs: torch.Tensor | None,  # [T]
    mask: torch.Tensor,  # [T] bool
    cu_seqlens: torch.Tensor,  # [R+1] int64
    pairs: torch.Tensor,  # [P, 2] int64
    preference: torch.Tensor,  # [P]
    beta: float,
) -> torch.Tensor:  # [P]
    """Masked values are replaced before they are summed, so a NaN there reaches neither loss nor gradient."""
    dtype = result_dtype(policy_logprobs)
    margins = _rollout_sums(policy_logprobs.to(dtype), mask, cu_seqlens)
    if reference_logprobs is not None:
        margins = margins - _rollout_sums(reference_logprobs.to(dtype), mask, cu_seqlens)
    return _preference_loss(margins, pairs, preference.to(dtype), beta)


def reference_forest_preference_loss(
    hidden: torch.Tensor,  # [U, D]
    weight: torch.Tensor,  # [V, D]
    forest: PackedForest,
    pairs: torch.Tensor,  # [P, 2] int64
    preference: torch.Tensor,  # [P]
    reference_logprobs: torch.Tensor | None,  # [T]
    beta: float,
) -> torch.Tensor:  # [P]
    """One log-prob for each edge that some pair needs; rows without such an edge never reach the LM head."""
    device, dtype = hidden.device, result_dtype(hidden, weight)
    needed = needed_edges(forest, pairs.cpu().numpy())
    edge_logprobs = linear_logprob(
        hidden[torch.from_numpy(needed.rows).to(device)], weight, needed.targets, rows=needed.row_of_edge
    )

    counted = needed.edge_of_token >= 0  # [T]
    tokens = torch.from_numpy(needed.edge_of_token[counted]).to(device)
    rollout_of = np.repeat(np.arange(forest.num_rollouts), np.diff(forest.cu_seqlens))
    owners = torch.from_numpy(rollout_of[counted]).to(device)
    margins = add_up(edge_logprobs[tokens], owners, forest.num_rollouts)
    if reference_logprobs is not None:
        mask = torch.from_numpy(forest.trained).to(device)
        cu_seqlens = torch.from_numpy(forest.cu_seqlens).to(device)
        margins = margins - _rollout_sums(reference_logprobs.to(dtype), mask, cu_seqlens)
    return _preference_loss(margins, pairs, preference.to(dtype), beta)


def _rollout_sums(
    values: torch.Tensor,  # [T]
    mask: torch.Tensor,  # [T] bool
    cu_seqlens: torch.Tensor,  # [R+1] int64
) -> torch.Tensor:  # [R]
    num_rollouts = len(cu_seqlens) - 1
    owners = torch.repeat_interleave(torch.arange(num_rollouts, device=values.device), cu_seqlens.diff())
    kept = torch.where(mask, values, values.new_zeros(()))
    return add_up(kept, owners, num_rollouts)


def _preference_loss(
    margins: torch.Tensor,  # [R] log-ratio of each rollout
    pairs: torch.Tensor,  # [P, 2] int64
    preference: torch.Tensor,  # [P]
    beta: float,
) -> torch.Tensor:  # [P]
    x = beta * (margins[pairs[:, 0]] - margins[pairs[:, 1]])
    return -preference * F.logsigmoid(x) - (1 - preference) * F.logsigmoid(-x)
