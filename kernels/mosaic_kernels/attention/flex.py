"""Tree attention by PyTorch's FlexAttention, with a block mask made from the block lists of the forest."""

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mosaic_kernels.attention.blocks import Tree, tree_for

BLOCK = 128  # FlexAttention's own default


def flex_tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D]
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, D]
    subtree_end: torch.Tensor,  # [U] int64
    *,
    positions: torch.Tensor | None,  # [U] int64
    window: int | None,
    scale: float,
    queries: torch.Tensor | None = None,  # [Uq] int64, rising; None: all
) -> torch.Tensor:  # [Uq, Hq, D]
    """Compiled on an accelerator (a shape's first call is slow); eager on CPU, without gradients."""
    if not q.shape[0]:
        return q * 1
    mask = block_mask(tree_for(subtree_end, queries, positions, window))
    attend: Callable[..., torch.Tensor] = _compiled() if q.device.type == "cuda" else flex_attention
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


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
    end, rows, depth, row_depth, window = tree.end, tree.rows, tree.depth, tree.row_depth, tree.window

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        at = rows[query]
        seen = (key <= at) & (at < end[key])
        if depth is None or row_depth is None or window is None:
            return seen
        return seen & (row_depth[query] - depth[key] < window)

    return visible


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=True)
