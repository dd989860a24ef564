"""Preference losses in plain PyTorch autograd."""

import numpy as np
import torch
import torch.nn.functional as F

from mosaic_kernels.dispatch import result_dtype
from mosaic_kernels.forest import BoolArray, IntArray, PackedForest
from mosaic_kernels.logprob import linear_logprob


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
    edges = np.flatnonzero(needed)
    rows, row_of_edge = np.unique(forest.parent[edges], return_inverse=True)
    edge_logprobs = linear_logprob(
        hidden[torch.from_numpy(rows).to(device)], weight, forest.tokens[edges], rows=row_of_edge
    )

    counted = forest.trained & needed[forest.node_index]  # [T]
    edge_of_node = np.cumsum(needed) - 1
    tokens = torch.from_numpy(edge_of_node[forest.node_index[counted]]).to(device)
    rollout_of = np.repeat(np.arange(forest.num_rollouts), np.diff(forest.cu_seqlens))
    owners = torch.from_numpy(rollout_of[counted]).to(device)
    margins = edge_logprobs.new_zeros(forest.num_rollouts).index_add(0, owners, edge_logprobs[tokens])
    if reference_logprobs is not None:
        mask = torch.from_numpy(forest.trained).to(device)
        cu_seqlens = torch.from_numpy(forest.cu_seqlens).to(device)
        margins = margins - _rollout_sums(reference_logprobs.to(dtype), mask, cu_seqlens)
    return _preference_loss(margins, pairs, preference.to(dtype), beta)


def needed_edges(forest: PackedForest, pairs: IntArray) -> BoolArray:
    """[U] True at nodes whose edge does not cancel in some pair: trained in one of its rollouts only.

    Two rollouts share nodes only at equal depth, so one comparison of their paths finds them.
    """
    needed = np.zeros(forest.num_nodes, np.bool_)
    for i, j in np.unique(np.sort(pairs, axis=1), axis=0).tolist():
        (nodes_i, trained_i), (nodes_j, trained_j) = _path(forest, i), _path(forest, j)
        overlap = min(len(nodes_i), len(nodes_j))
        cancels = (nodes_i[:overlap] == nodes_j[:overlap]) & trained_i[:overlap] & trained_j[:overlap]
        for nodes, trained in ((nodes_i, trained_i), (nodes_j, trained_j)):
            needed[nodes[:overlap][trained[:overlap] & ~cancels]] = True
            needed[nodes[overlap:][trained[overlap:]]] = True
    return needed


def _path(forest: PackedForest, rollout: int) -> tuple[IntArray, BoolArray]:
    span = slice(forest.cu_seqlens[rollout], forest.cu_seqlens[rollout + 1])
    return forest.node_index[span], forest.trained[span]


def _rollout_sums(
    values: torch.Tensor,  # [T]
    mask: torch.Tensor,  # [T] bool
    cu_seqlens: torch.Tensor,  # [R+1] int64
) -> torch.Tensor:  # [R]
    num_rollouts = len(cu_seqlens) - 1
    owners = torch.repeat_interleave(torch.arange(num_rollouts, device=values.device), cu_seqlens.diff())
    kept = torch.where(mask, values, values.new_zeros(()))
    return values.new_zeros(num_rollouts).index_add(0, owners, kept)


def _preference_loss(
    margins: torch.Tensor,  # [R] log-ratio of each rollout
    pairs: torch.Tensor,  # [P, 2] int64
    preference: torch.Tensor,  # [P]
    beta: float,
) -> torch.Tensor:  # [P]
    x = beta * (margins[pairs[:, 0]] - margins[pairs[:, 1]])
    return -preference * F.logsigmoid(x) - (1 - preference) * F.logsigmoid(-x)
