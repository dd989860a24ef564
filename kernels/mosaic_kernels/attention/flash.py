"""Tree attention by flash-attn's varlen functions, with the keys and values of every path gathered.

Each run of consecutive queries in one segment is one sequence: its keys are the path from the root to the
run's last query, and causal masking aligned at the end is the tree's mask. The price is a copy of K and V for
each run, which is logged.
"""

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch.nn.functional import pad

from mosaic_kernels.attention.blocks import Tree, tree_for
from mosaic_kernels.fixed_order import pick
from mosaic_kernels.forest.layout import IntArray

logger = logging.getLogger("mosaic_kernels")


@dataclass(frozen=True, eq=False)
class Gather:
    """Sequences for a varlen call."""

    keys: torch.Tensor  # [G] int64: packed position of each gathered key
    cu_queries: torch.Tensor  # [S+1] int32
    cu_keys: torch.Tensor  # [S+1] int32
    longest_queries: int
    longest_keys: int


def flash_tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D] bf16 or fp16
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, V]
    subtree_end: torch.Tensor,  # [U] int64
    *,
    positions: torch.Tensor | None,  # [U] int64; read with a chunk: a window counts along the path
    window: int | None,
    scale: float,
    queries: torch.Tensor | None = None,  # [Uq] int64, rising; None: all
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> torch.Tensor:  # [Uq, Hq, V]
    """ValueError without flash-attn, and for what it does not compute: fp32 and fp64, sinks."""
    flash_attn = _flash_attn()
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"tree_attention: backend='flash' computes bf16 and fp16, got {q.dtype}")
    if sinks is not None:
        raise ValueError(
            "tree_attention: backend='flash' has no sinks (flash-attn gives no gradient of its logsumexp); "
            "use backend='triton', 'flex' or 'reference'"
        )
    if not q.shape[0]:
        return q.new_empty(0, q.shape[1], v.shape[2]) + 0 * q.sum()
    gather = gather_for(tree_for(subtree_end, queries, positions if chunk else None, None, chunk))
    k, v = pick(k, gather.keys), pick(v, gather.keys)
    value_size, size = v.shape[2], max(q.shape[2], v.shape[2])
    q, k, v = (pad(x, (0, size - x.shape[2])) for x in (q, k, v))  # it knows one size; zeros change nothing
    out = flash_attn.flash_attn_varlen_func(
        q, k, v, gather.cu_queries, gather.cu_keys, gather.longest_queries, gather.longest_keys,
        softmax_scale=scale, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0, deterministic=True,
    )  # fmt: skip
    return out[..., :value_size]


def _flash_attn() -> ModuleType:
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "tree_attention: backend='flash' needs the package flash-attn "
            "(pip install flash-attn --no-build-isolation), which is not installed"
        )
    return importlib.import_module("flash_attn")


def gather_for(tree: Tree) -> Gather:
    """The gather of a forest, kept with it: making it waits for the device."""
    if "flash" in tree.derived:
        return tree.derived["flash"]
    end, rows = (x.cpu().numpy().astype(np.int64) for x in (tree.end, tree.rows))
    limit = None if tree.limit is None else tree.limit.cpu().numpy()
    gather = tree.derived["flash"] = build_gather(end, rows, tree.end.device, limit)
    copied = len(gather.keys) / len(end)
    logger.info(
        "tree_attention: flash gathers K and V of %d tokens, %.2f times all", len(gather.keys), copied
    )
    return gather


def build_gather(
    subtree_end: IntArray, rows: IntArray, device: torch.device, chunk_end: IntArray | None = None
) -> Gather:
    """The sequences of these query rows, [Uq] rising packed positions, at least one.

    chunk_end: [U] the depth where each node's chunk ends; a sequence lies in one chunk.
    """
    chunk_end = np.zeros_like(subtree_end) if chunk_end is None else chunk_end
    breaks = (np.diff(rows) != 1) | (np.diff(subtree_end[rows]) != 0) | (np.diff(chunk_end[rows]) != 0)
    first = np.append(0, np.flatnonzero(breaks) + 1)  # [S]
    last = np.append(first[1:], len(rows)) - 1
    paths = [
        np.flatnonzero((subtree_end[: node + 1] > node) & (chunk_end[: node + 1] == chunk_end[node]))
        for node in rows[last]
    ]
    num_queries, num_keys = last - first + 1, np.array([len(path) for path in paths])

    def cumulative(lengths: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.append(0, np.cumsum(lengths))).to(device, torch.int32)

    return Gather(
        keys=torch.from_numpy(np.concatenate(paths)).to(device),
        cu_queries=cumulative(num_queries),
        cu_keys=cumulative(num_keys),
        longest_queries=int(num_queries.max()),
        longest_keys=int(num_keys.max()),
    )
