"""Tree attention with a dense mask: O(Uq U) memory, plain PyTorch, any floating dtype."""

import torch

from mosaic_kernels.attention.blocks import first_blind_depth
from mosaic_kernels.dispatch import result_dtype


def reference_tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D]
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, V]
    subtree_end: torch.Tensor,  # [U] int64
    *,
    positions: torch.Tensor | None,  # [U] int64
    window: int | None,
    scale: float,
    queries: torch.Tensor | None = None,  # [Uq] int64, None: all
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> torch.Tensor:  # [Uq, Hq, V]
    """softmax(scale q k^T) v over the visible keys, in fp32 (fp64 for fp64), returned in q's dtype."""
    num_queries, query_heads, head_dim = q.shape
    dtype = result_dtype(q)
    group = query_heads // k.shape[1]
    key = torch.arange(k.shape[0], device=q.device)
    row = key if queries is None else queries
    visible = (key[None, :] <= row[:, None]) & (row[:, None] < subtree_end[None, :])  # [query, key]
    if positions is not None and (window, chunk) != (None, None):
        visible &= positions[row][:, None] < first_blind_depth(positions, window, chunk)[None, :]
    scaled = q.to(dtype).reshape(num_queries, k.shape[1], group, head_dim) * scale
    scores = torch.einsum("qhgd,khd->hgqk", scaled, k.to(dtype))
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).view(*scores.shape[:2], 1, 1).expand(-1, -1, num_queries, 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : len(key)]
    out = torch.einsum("hgqk,khd->qhgd", weights, v.to(dtype))
    return out.reshape(num_queries, query_heads, v.shape[2]).to(q.dtype)
