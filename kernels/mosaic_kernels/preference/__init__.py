"""Preference losses over pairs of rollouts."""

import numpy as np
import torch

from mosaic_kernels.dispatch import Backends, Defaults, IndexLike, as_index, choose_backend
from mosaic_kernels.forest.layout import PackedForest
from mosaic_kernels.preference.reference import (
    reference_forest_preference_loss,
    reference_pairwise_preference_loss,
)

BACKENDS: Backends = {"reference": None, "triton": ("cuda",)}
DEFAULTS: Defaults = {"cuda": ("triton", "reference")}

__all__ = ["BACKENDS", "forest_preference_loss", "pairwise_preference_loss"]


def pairwise_preference_loss(
    policy_logprobs: torch.Tensor,  # [T] floating, differentiable
    reference_logprobs: torch.Tensor | None,  # [T] floating
    mask: IndexLike,  # [T] bool, True where a token counts; masked values may be anything, even NaN
    cu_seqlens: IndexLike,  # [R+1] int
    pairs: IndexLike,  # [P, 2] int in [0, R)
    preference: IndexLike,  # [P] floating in [0, 1]: 1 if the first of the pair is better, 0.5 for a tie
    *,
    beta: float,
    backend: str = "auto",
) -> torch.Tensor:  # [P] fp32, or fp64 for fp64 input
    """-p logsigmoid(x) - (1 - p) logsigmoid(-x) with x = beta ((s_i - s_j) - (r_i - r_j)).

    s and r are the sums of the policy's and the reference's log-probs over a rollout's masked tokens:
    DPO's loss (Rafailov et al., arXiv 2305.18290, eq. 7) with soft labels. reference_logprobs None drops r.

    Example: two rollouts of two tokens, pairs = [[0, 1]], preference = [1.0]: the loss falls as the
    first rollout's log-probs rise.
    """
    device = policy_logprobs.device
    if policy_logprobs.ndim != 1:
        raise ValueError(f"policy_logprobs must be [T], got shape {tuple(policy_logprobs.shape)}")
    num_tokens = len(policy_logprobs)
    if reference_logprobs is not None and reference_logprobs.shape != (num_tokens,):
        raise ValueError(
            f"reference_logprobs has shape {tuple(reference_logprobs.shape)}, expected ({num_tokens},)"
        )
    mask_tensor = torch.as_tensor(mask, device=device)
    if mask_tensor.shape != (num_tokens,) or mask_tensor.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool [{num_tokens}], got {mask_tensor.dtype} {tuple(mask_tensor.shape)}"
        )
    bounds = as_index("cu_seqlens", cu_seqlens, device, below=num_tokens + 1)
    if bounds.ndim != 1 or len(bounds) < 1:
        raise ValueError(f"cu_seqlens must be [R+1], got shape {tuple(bounds.shape)}")
    if bounds.device.type == "cpu" and (
        bounds[0] != 0 or bounds[-1] != num_tokens or (bounds.diff() < 0).any()
    ):
        raise ValueError(f"cu_seqlens must rise from 0 to T={num_tokens}")
    pair_index, labels = _check_pairs(pairs, preference, len(bounds) - 1, device)
    if _chosen("pairwise_preference_loss", backend, policy_logprobs) == "triton":
        from mosaic_kernels.preference.triton import triton_pairwise_preference_loss as preference_loss
    else:
        preference_loss = reference_pairwise_preference_loss
    return preference_loss(policy_logprobs, reference_logprobs, mask_tensor, bounds, pair_index, labels, beta)


def forest_preference_loss(
    hidden: torch.Tensor,  # [U, D] floating, the final hidden state of each node
    weight: torch.Tensor,  # [V, D] floating, the LM head
    forest: PackedForest,
    pairs: IndexLike,  # [P, 2] int in [0, R)
    preference: IndexLike,  # [P] floating in [0, 1]
    *,
    reference_logprobs: torch.Tensor | None = None,  # [T] floating
    beta: float,
    backend: str = "auto",
) -> torch.Tensor:  # [P] fp32, or fp64 for fp64 input
    """`pairwise_preference_loss` straight from hidden states, with mask = forest.trained.

    Edges whose log-prob cancels in every pair (trained in both rollouts or in neither: the shared trunk)
    never reach the LM head. reference_logprobs is summed over all trained tokens of each rollout: it may
    differ between rollouts on a shared node, and then does not cancel.

    Example: rollouts [5, 6, 7] and [5, 6, 8] as one pair need only the edges 6 -> 7 and 6 -> 8.
    """
    if hidden.ndim != 2 or hidden.shape[0] != forest.num_nodes:
        raise ValueError(f"hidden must be [U={forest.num_nodes}, D], got shape {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [V, D={hidden.shape[1]}], got shape {tuple(weight.shape)}")
    if reference_logprobs is not None and reference_logprobs.shape != (forest.num_tokens,):
        raise ValueError(
            f"reference_logprobs has shape {tuple(reference_logprobs.shape)}, expected ({forest.num_tokens},)"
        )
    pair_index, labels = _check_pairs(pairs, preference, forest.num_rollouts, hidden.device)
    if _chosen("forest_preference_loss", backend, hidden, weight) == "triton":
        from mosaic_kernels.preference.triton import triton_forest_preference_loss as preference_loss
    else:
        preference_loss = reference_forest_preference_loss
    return preference_loss(hidden, weight, forest, pair_index, labels, reference_logprobs, beta)


def _chosen(op: str, backend: str, *tensors: torch.Tensor) -> str:
    if backend == "auto" and any(x.dtype == torch.float64 for x in tensors):
        backend = "reference"  # the Triton kernels compute in fp32
    return choose_backend(op, backend, tensors[0].device, BACKENDS, DEFAULTS)


def _check_pairs(
    pairs: IndexLike, preference: IndexLike, num_rollouts: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """pairs [P, 2] int64 and preference [P] floating on the device, ranges checked."""
    pair_index = as_index("pairs", pairs, device, below=num_rollouts)
    if pair_index.ndim != 2 or pair_index.shape[1] != 2:
        raise ValueError(f"pairs must be [P, 2], got shape {tuple(pair_index.shape)}")
    labels = (
        preference
        if isinstance(preference, torch.Tensor)
        else torch.from_numpy(np.ascontiguousarray(preference))
    )
    if labels.shape != pair_index.shape[:1]:
        raise ValueError(f"preference has shape {tuple(labels.shape)} for {len(pair_index)} pairs")
    if labels.device.type == "cpu" and not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("preference must lie in [0, 1]")
    return pair_index, labels.to(device)
