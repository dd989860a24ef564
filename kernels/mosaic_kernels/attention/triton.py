"""Tree attention by the Triton kernels: launches, autograd, and the check before first use."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch.autograd.function import once_differentiable

from mosaic_kernels.attention import kernels
from mosaic_kernels.attention.blocks import Tree, tree_for
from mosaic_kernels.attention.reference import reference_tree_attention
from mosaic_kernels.attention.tiles import Tile, Tiles, architecture_of, tf32_allowed, tiles_for
from mosaic_kernels.dispatch import launch
from mosaic_kernels.forest.layout import pack_forest
from mosaic_kernels.selfcheck import Deviation, check_once, deviations_of

ALIGNMENT = 16  # bytes of an address, and elements of a stride, that the kernels are compiled for
DELTA_BLOCK = 64


def triton_tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D] bf16, fp16 or fp32
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, D]
    subtree_end: torch.Tensor,  # [U] int64
    *,
    positions: torch.Tensor | None,  # [U] int64
    window: int | None,
    scale: float,
    queries: torch.Tensor | None = None,  # [Uq] int64, rising; None: all
) -> torch.Tensor:  # [Uq, Hq, D]
    """fp32 softmax and accumulation whatever the dtype; fp32 dots are IEEE unless torch allows TF32.

    ValueError if the tile table has no entry for this head size, dtype and architecture.
    """
    tiles = tiles_for(architecture_of(q.device), q.shape[-1], q.dtype)
    precision = "tf32" if q.dtype == torch.float32 and tf32_allowed() else "ieee"
    variant = Variant(q.dtype, precision, q.shape[-1], q.shape[1] // k.shape[1], window is not None)
    check_once("tree_attention", q.device, variant, deviations)
    tree = tree_for(subtree_end, queries, positions, window)
    return attend(q, k, v, tree, scale, tiles)


@dataclass(frozen=True)
class Variant:
    """What compiles to different kernels."""

    dtype: torch.dtype
    precision: str
    head_dim: int
    group: int  # query heads a key head
    window: bool


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, scale: float, tiles: Tiles
) -> torch.Tensor:  # [Uq, Hq, D]
    """The kernels on a Tree with given tiles."""
    return _TreeAttention.apply(q, k, v, tree, scale, tiles)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, scale: float, tiles: Tiles
    ) -> torch.Tensor:
        q, k, v = (_aligned(x) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        if out.numel():
            tile = tiles.forward
            lists = tree.lists(tile.block_q, tile.block_k, by_key=False)
            launch(
                kernels.forward_kernel, len(lists.work) * q.shape[1],
                q, k, v, out, lse, *_indices(tree), lists.work, lists.blocks,
                *_sizes(q, k, q.shape[1], tree, scale), *_strides(q, k, v),
                **_constants(q, k, tree, tile),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tree, ctx.scale, ctx.tiles = tree, scale, tiles
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        tree, scale, tiles = ctx.tree, ctx.scale, ctx.tiles
        grad = _aligned(grad_outputs[0])
        needs_q, needs_k, needs_v = ctx.needs_input_grad[:3]
        dq = torch.empty_like(out) if needs_q else None
        dk = dv = None
        if needs_k or needs_v:  # one kernel makes both
            dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        if not out.numel():
            return dq, *(x if x is None else x.zero_() for x in (dk, dv)), None, None, None

        num_queries, num_heads, head_dim = q.shape
        delta = torch.empty_like(lse)
        launch(
            kernels.delta_kernel, triton.cdiv(num_queries, DELTA_BLOCK) * num_heads,
            out, grad, delta, num_queries, num_heads, *_strides(grad),
            D=head_dim, BLOCK_Q=DELTA_BLOCK, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
        )  # fmt: skip
        inputs = (q, k, v, grad, lse, delta)
        if dq is not None:
            lists = tree.lists(tiles.dq.block_q, tiles.dq.block_k, by_key=False)
            launch(
                kernels.dq_kernel, len(lists.work) * num_heads,
                *inputs, dq, *_indices(tree), lists.work, lists.blocks,
                *_sizes(q, k, num_heads, tree, scale), *_strides(q, k, v, grad),
                **_constants(q, k, tree, tiles.dq),
            )  # fmt: skip
        if dk is not None and dv is not None:
            lists = tree.lists(tiles.dkv.block_q, tiles.dkv.block_k, by_key=True)
            launch(
                kernels.dkv_kernel, len(lists.work) * k.shape[1],
                *inputs, dk, dv, *_indices(tree), lists.work, lists.blocks,
                *_sizes(q, k, k.shape[1], tree, scale), *_strides(q, k, v, grad),
                **_constants(q, k, tree, tiles.dkv),
            )  # fmt: skip
        return dq, dk if needs_k else None, dv if needs_v else None, None, None, None


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy where its layout is not what the kernels are compiled for."""
    strides_fit = x.stride(-1) == 1 and all(stride % ALIGNMENT == 0 for stride in x.stride()[:-1])
    if strides_fit and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def _indices(tree: Tree) -> tuple[torch.Tensor, ...]:
    depth = tree.end if tree.depth is None else tree.depth  # without a window it is not read
    return tree.end, tree.rows, depth, tree.rows if tree.row_depth is None else tree.row_depth


def _sizes(
    q: torch.Tensor, k: torch.Tensor, num_heads: int, tree: Tree, scale: float
) -> tuple[int, int, int, int, float]:
    return q.shape[0], k.shape[0], num_heads, tree.window or 0, scale


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _constants(q: torch.Tensor, k: torch.Tensor, tree: Tree, tile: Tile) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[-1],
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "BLOCK_D": triton.next_power_of_2(q.shape[-1]),
        "WINDOW": tree.window is not None,
        "PRECISION": "tf32" if q.dtype == torch.float32 and tf32_allowed() else "ieee",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def deviations(device: torch.device, variant: Hashable) -> Mapping[str, Deviation]:
    """The self-check: output and gradients on a small forest, against the reference in fp64."""
    assert isinstance(variant, Variant)
    dtype, head_dim, windowed = variant.dtype, variant.head_dim, variant.window
    rng = np.random.default_rng(0)
    trunk = rng.integers(50, size=150).tolist()
    forks = ((150, 90), (150, 31), (70, 60))
    branches = [trunk[:cut] + rng.integers(50, size=tail).tolist() for cut, tail in forks]
    forest = pack_forest([*branches, rng.integers(50, size=40).tolist(), [3]])
    end = torch.from_numpy(forest.subtree_end).to(device)
    positions = torch.from_numpy(forest.positions).to(device) if windowed else None
    generator = torch.Generator().manual_seed(0)
    query_heads = 2 * variant.group
    shapes = [(forest.num_nodes, heads, head_dim) for heads in (query_heads, 2, 2, query_heads)]
    q, k, v, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    window, scale = (60 if windowed else None), head_dim**-0.5

    def results(dtype: torch.dtype, triton_kernels: bool) -> dict[str, torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        if triton_kernels:
            tiles = tiles_for(architecture_of(device), head_dim, dtype)
            out = attend(*leaves, tree=tree_for(end, None, positions, window), scale=scale, tiles=tiles)
        else:
            out = reference_tree_attention(
                *leaves, subtree_end=end, positions=positions, window=window, scale=scale
            )
        gradients = torch.autograd.grad(out, leaves, weight.to(dtype))
        return dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))

    exact, plain, ours = results(torch.float64, False), results(dtype, False), results(dtype, True)
    return deviations_of(ours, plain, exact, dtype)
