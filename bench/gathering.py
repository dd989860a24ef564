"""Attention over gathered keys and values: each run of queries of a forest with a copy of its path's.

What a tree costs with kernels that know sequences only: by SDPA a call a run, by a varlen function one call
for all.
"""

from __future__ import annotations

import importlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_kernels.attention.flash import Gather, build_gather

Run = tuple[
    int, Tensor, Tensor | None
]  # number of queries, keys [K] int64, mask [Q, K] (None: causal square)


def gather_of(subtree_end: np.ndarray, device: torch.device) -> Gather:
    """All runs of queries of a forest and the paths they attend to. subtree_end: [U]."""
    return build_gather(subtree_end, np.arange(len(subtree_end)), device)


def gathered_runs(subtree_end: np.ndarray, device: torch.device) -> list[Run]:
    """Runs of queries with the path each attends to."""
    gather = gather_of(subtree_end, device)
    queries, keys = gather.cu_queries.tolist(), gather.cu_keys.tolist()
    runs: list[Run] = []
    for index in range(len(queries) - 1):
        count, path = queries[index + 1] - queries[index], gather.keys[keys[index] : keys[index + 1]]
        mask = None
        if count < len(path):
            mask = torch.ones(count, len(path), dtype=torch.bool, device=device).tril_(len(path) - count)
        runs.append((count, path, mask))
    return runs


def gather_attention(
    query: Tensor,  # [1, Hq, U, D]
    key: Tensor,  # [1, Hkv, U, D]
    value: Tensor,  # [1, Hkv, U, D]
    runs: list[Run],
    scale: float | None = None,
) -> Tensor:  # [1, Hq, U, D]
    """One SDPA call a run, on a copy of the keys and values of its path."""
    queries = query.split([count for count, _, _ in runs], dim=2)
    parts = [
        F.scaled_dot_product_attention(
            rows, key.index_select(2, path), value.index_select(2, path),
            attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
        )
        for rows, (_, path, mask) in zip(queries, runs, strict=True)
    ]  # fmt: skip
    return torch.cat(parts, dim=2)


def varlen_attention(
    query: Tensor,  # [U, Hq, D]
    key: Tensor,  # [U, Hkv, D]
    value: Tensor,  # [U, Hkv, D]
    gather: Gather,
    scale: float | None = None,
) -> Tensor:  # [U, Hq, D]
    """PyTorch's varlen_attn, causal and aligned at the end of each path. CUDA, bf16 and fp16."""
    module = importlib.import_module("torch.nn.attention.varlen")
    return module.varlen_attn(
        query, key.index_select(0, gather.keys), value.index_select(0, gather.keys),
        gather.cu_queries, gather.cu_keys, gather.longest_queries, gather.longest_keys,
        scale=scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
