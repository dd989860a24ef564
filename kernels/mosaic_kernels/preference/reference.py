"""Preference losses in plain PyTorch autograd."""

import numpy as np
import torch
import torch.nn.functional as F

from mosaic_kernels.dispatch import result_dtype
from mosaic_kernels.forest import PackedForest
from mosaic_kernels.logprob import linear_logprob
from mosaic_kernels.preference.tree import needed_edges


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
    margins = edge_logprobs.new_zeros(forest.num_rollouts).index_add(0, owners, edge_logprobs[tokens])
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
    return values.new_zeros(num_rollouts).index_add(0, owners, kept)


def _preference_loss(
    margins: torch.Tensor,  # [R] log-ratio of each rollout
    pairs: torch.Tensor,  # [P, 2] int64
    preference: torch.Tensor,  # [P]
    beta: float,
) -> torch.Tensor:  # [P]
    x = beta * (margins[pairs[:, 0]] - margins[pairs[:, 1]])
    return -preference * F.logsigmoid(x) - (1 - preference) * F.logsigmoid(-x)
