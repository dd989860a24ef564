"""Tree attention by PyTorch's FlexAttention, with a block mask made from the block lists of the forest."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from mosaic_kernels.attention.blocks import Tree, tree_for

BLOCK = 128  # FlexAttention's own default


def flex_tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D]
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, V]
    subtree_end: torch.Tensor,  # [U] int64
    *,
    positions: torch.Tensor | None,  # [U] int64
    window: int | None,
    scale: float,
    queries: torch.Tensor | None = None,  # [Uq] int64, rising; None: all
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> torch.Tensor:  # [Uq, Hq, V]
    """Compiled on an accelerator (a shape's first call is slow); eager on CPU, without gradients."""
    if not q.shape[0]:
        return q.new_empty(0, q.shape[1], v.shape[2]) + 0 * q.sum()
    mask = block_mask(tree_for(subtree_end, queries, positions, window, chunk))
    attend: Callable[..., Any] = _compiled() if q.device.type == "cuda" else flex_attention
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    bent = None if softcap is None else _capped(softcap)
    options = {"score_mod": bent, "block_mask": mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if sinks is None:
        out = attend(q, k, v, **options)
    else:  # a sink takes its share of the softmax: exp(sink) / (exp(sink) + exp(lse))
        out, rest = attend(q, k, v, **options, return_aux=AuxRequest(lse=True))
        share = torch.sigmoid(rest.lse - sinks.float()[None, :, None])
        out = (out * share[..., None]).to(q.dtype)
    return out.squeeze(0).transpose(0, 1)


@functools.lru_cache(maxsize=8)
def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    def bend(score: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    return bend


def block_mask(tree: Tree) -> BlockMask:
    """The tree's mask in FlexAttention's form, kept with the tree."""
    if "flex" in tree.derived:
        return tree.derived["flex"]
    visited, full = tree.pairs(BLOCK, BLOCK)
    partial, full = visited & ~full, visited & full
    counts = [one.sum(1)[None, None].int() for one in (partial, full)]
    # Each row's blocks first, rising; what follows them is not read.
    orders = [one.argsort(dim=1, descending=True, stable=True)[None, None].int() for one in (partial, full)]
    mask = BlockMask.from_kv_blocks(
        counts[0], orders[0], counts[1], orders[1],
        BLOCK_SIZE=BLOCK, mask_mod=_mask_mod(tree), seq_lengths=(len(tree.rows), len(tree.end)),
    )  # fmt: skip
    tree.derived["flex"] = mask
    return mask


def _mask_mod(tree: Tree) -> Callable[..., torch.Tensor]:
    end, rows, limit, row_depth = tree.end, tree.rows, tree.limit, tree.row_depth

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        at = rows[query]
        seen = (key <= at) & (at < end[key])
        if limit is None or row_depth is None:
            return seen
        return seen & (row_depth[query] < limit[key])

    return visible


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=True)
