"""Tree attention with a dense mask: O(Uq U) memory, plain PyTorch, any floating dtype."""

import torch

from mosaic_kernels.dispatch import result_dtype


def reference_tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D]
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, D]
    subtree_end: torch.Tensor,  # [U] int64
    *,
    positions: torch.Tensor | None,  # [U] int64
    window: int | None,
    scale: float,
    queries: torch.Tensor | None = None,  # [Uq] int64, None: all
) -> torch.Tensor:  # [Uq, Hq, D]
    """softmax(scale q k^T) v over the visible keys, in fp32 (fp64 for fp64), returned in q's dtype."""
    num_queries, query_heads, head_dim = q.shape
    dtype = result_dtype(q)
    group = query_heads // k.shape[1]
    key = torch.arange(k.shape[0], device=q.device)
    row = key if queries is None else queries
    visible = (key[None, :] <= row[:, None]) & (row[:, None] < subtree_end[None, :])  # [query, key]
    if window is not None and positions is not None:
        visible &= positions[row][:, None] - positions[None, :] < window
    scaled = q.to(dtype).reshape(num_queries, k.shape[1], group, head_dim) * scale
    scores = torch.einsum("qhgd,khd->hgqk", scaled, k.to(dtype))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = torch.einsum("hgqk,khd->qhgd", weights, v.to(dtype))
    return out.reshape(q.shape).to(q.dtype)
