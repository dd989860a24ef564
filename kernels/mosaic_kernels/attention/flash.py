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
    v: torch.Tensor,  # [U, Hkv, D]
    subtree_end: torch.Tensor,  # [U] int64
    *,
    positions: torch.Tensor | None,  # [U] int64; not read: along a path depth and index differ by a constant
    window: int | None,
    scale: float,
    queries: torch.Tensor | None = None,  # [Uq] int64, rising; None: all
) -> torch.Tensor:  # [Uq, Hq, D]
    """ValueError without flash-attn, or for fp32 and fp64, which it does not compute."""
    flash_attn = _flash_attn()
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"tree_attention: backend='flash' computes bf16 and fp16, got {q.dtype}")
    if not q.shape[0]:
        return q * 1
    gather = gather_for(tree_for(subtree_end, queries, None, None))
    return flash_attn.flash_attn_varlen_func(
        q, pick(k, gather.keys), pick(v, gather.keys),
        gather.cu_queries, gather.cu_keys, gather.longest_queries, gather.longest_keys,
        softmax_scale=scale, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=True,
    )  # fmt: skip


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
    gather = tree.derived["flash"] = build_gather(end, rows, tree.end.device)
    copied = len(gather.keys) / len(end)
    logger.info(
        "tree_attention: flash gathers K and V of %d tokens, %.2f times all", len(gather.keys), copied
    )
    return gather


def build_gather(subtree_end: IntArray, rows: IntArray, device: torch.device) -> Gather:
    """The sequences of these query rows, [Uq] rising packed positions, at least one."""
    breaks = (np.diff(rows) != 1) | (np.diff(subtree_end[rows]) != 0)
    first = np.append(0, np.flatnonzero(breaks) + 1)  # [S]
    last = np.append(first[1:], len(rows)) - 1
    paths = [np.flatnonzero(subtree_end[: node + 1] > node) for node in rows[last]]
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
