"""Tree attention by the Triton kernels: launches, autograd, and the check before first use."""

import math
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
LOG2_E = math.log2(math.e)


def triton_tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D] bf16, fp16 or fp32
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
    """fp32 softmax and accumulation whatever the dtype; fp32 dots are IEEE unless torch allows TF32.

    ValueError if the tile table has no entry for these head sizes, dtype and architecture.
    """
    variant = Variant(
        q.dtype, "tf32" if q.dtype == torch.float32 and tf32_allowed() else "ieee", q.shape[2],
        q.shape[1] // k.shape[1], (window, chunk) != (None, None),
        value_dim=v.shape[2], softcap=softcap is not None, sinks=sinks is not None,
    )  # fmt: skip
    tiles = _tiles(variant, q.device)
    check_once("tree_attention", q.device, variant, deviations)
    tree = tree_for(subtree_end, queries, positions, window, chunk)
    return attend(q, k, v, tree, scale, tiles, softcap, sinks)


@dataclass(frozen=True)
class Variant:
    """What compiles to different kernels."""

    dtype: torch.dtype
    precision: str
    head_dim: int
    group: int  # query heads a key head
    limit: bool  # a window or chunks
    value_dim: int
    softcap: bool = False
    sinks: bool = False


def _tiles(variant: Variant, device: torch.device) -> Tiles:
    size, value_size = variant.head_dim, variant.value_dim
    bent = variant.limit or variant.softcap or size != value_size or variant.group == 1
    return tiles_for(architecture_of(device), max(size, value_size), variant.dtype, bent=bent)


def attend(
    q: torch.Tensor,  # [Uq, Hq, D]
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, V]
    tree: Tree,
    scale: float,
    tiles: Tiles,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> torch.Tensor:  # [Uq, Hq, V]
    """The kernels on a Tree with given tiles."""
    sinks = None if sinks is None else sinks.float().contiguous()
    if scale < 0:  # the forward kernel takes the largest product for the largest score
        q, scale = -q, -scale
    return _TreeAttention.apply(q, k, v, sinks, tree, scale, softcap, tiles)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,  # fp32
        tree: Tree,
        scale: float,
        softcap: float | None,
        tiles: Tiles,
    ) -> torch.Tensor:
        q, k, v = (_aligned(x) for x in (q, k, v))
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        if out.numel():
            tile = tiles.forward
            lists = tree.lists(tile.block_q, tile.block_k, by_key=False)
            launch(
                kernels.forward_kernel, len(lists.work) * q.shape[1],
                q, k, v, lse if sinks is None else sinks, out, lse,
                *_indices(tree), lists.work, lists.blocks,
                *_sizes(q, k, q.shape[1], scale, softcap), *_strides(q, k, v),
                **_constants(q, k, v, tree, tile, softcap), SINKS=sinks is not None,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.tree, ctx.scale, ctx.softcap, ctx.tiles = tree, scale, softcap, tiles
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        tree, scale, softcap, tiles = ctx.tree, ctx.scale, ctx.softcap, ctx.tiles
        grad = _aligned(grad_outputs[0])
        needs_q, needs_k, needs_v, needs_sinks = ctx.needs_input_grad[:4]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if needs_q else None
        dk = dv = d_sinks = None
        if needs_k or needs_v:  # one kernel makes both
            dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        if not out.numel():
            d_sinks = torch.zeros_like(sinks) if needs_sinks else None
            return dq, *(x if x is None else x.zero_() for x in (dk, dv)), d_sinks, None, None, None, None

        num_queries, num_heads, value_dim = out.shape
        delta = torch.empty_like(lse)
        launch(
            kernels.delta_kernel, triton.cdiv(num_queries, DELTA_BLOCK) * num_heads,
            out, grad, delta, num_queries, num_heads, *_strides(grad),
            V=value_dim, BLOCK_Q=DELTA_BLOCK, BLOCK_V=padded_size(value_dim),
            num_warps=delta_warps(value_dim),
        )  # fmt: skip
        inputs = (q, k, v, grad, lse, delta)
        if dq is not None:
            lists = tree.lists(tiles.dq.block_q, tiles.dq.block_k, by_key=False)
            launch(
                kernels.dq_kernel, len(lists.work) * num_heads,
                *inputs, dq, *_indices(tree), lists.work, lists.blocks,
                *_sizes(q, k, num_heads, scale, softcap), *_strides(q, k, v, grad),
                **_constants(q, k, v, tree, tiles.dq, softcap),
            )  # fmt: skip
        if dk is not None and dv is not None:
            lists = tree.lists(tiles.dkv.block_q, tiles.dkv.block_k, by_key=True)
            for keys, values in ((True, False), (False, True)) if tiles.apart else ((True, True),):
                launch(
                    kernels.dkv_kernel, len(lists.work) * k.shape[1],
                    *inputs, dk, dv, *_indices(tree), lists.work, lists.blocks,
                    *_sizes(q, k, k.shape[1], scale, softcap), *_strides(q, k, v, grad),
                    **_constants(q, k, v, tree, tiles.dkv, softcap), KEYS=keys, VALUES=values,
                )  # fmt: skip
        if needs_sinks:  # a key of value 0 whose gradient of the weight is 0
            d_sinks = -(torch.exp2(sinks[:, None] * LOG2_E - lse) * delta).sum(1)
        return dq, dk if needs_k else None, dv if needs_v else None, d_sinks, None, None, None, None


def delta_warps(value_dim: int) -> int:
    """Warps of the delta kernel, whose programs hold DELTA_BLOCK rows at once."""
    return 4 if value_dim <= 256 else 8


def padded_size(head_dim: int) -> int:
    """Columns of a tile: a power of two, and as many as the smallest product of tiles has."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy where its layout is not what the kernels are compiled for."""
    strides_fit = x.stride(-1) == 1 and all(stride % ALIGNMENT == 0 for stride in x.stride()[:-1])
    if strides_fit and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def _indices(tree: Tree) -> tuple[torch.Tensor, ...]:
    limit = tree.end if tree.limit is None else tree.limit  # without one it is not read
    return tree.end, tree.rows, limit, tree.rows if tree.row_depth is None else tree.row_depth


def _sizes(
    q: torch.Tensor, k: torch.Tensor, num_heads: int, scale: float, softcap: float | None
) -> tuple[int, int, int, float, float]:
    return q.shape[0], k.shape[0], num_heads, scale, softcap or 1.0


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _constants(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tree: Tree, tile: Tile, softcap: float | None
) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "V": v.shape[2],
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "BLOCK_D": padded_size(q.shape[2]),
        "BLOCK_V": padded_size(v.shape[2]),
        "LIMIT": tree.limit is not None,
        "SOFTCAP": softcap is not None,
        "PRECISION": "tf32" if q.dtype == torch.float32 and tf32_allowed() else "ieee",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def deviations(device: torch.device, variant: Hashable) -> Mapping[str, Deviation]:
    """The self-check: output and gradients on a small forest, against the reference in fp64."""
    assert isinstance(variant, Variant)
    dtype, size, value_size = variant.dtype, variant.head_dim, variant.value_dim
    rng = np.random.default_rng(0)
    trunk = rng.integers(50, size=150).tolist()
    forks = ((150, 90), (150, 31), (70, 60))
    branches = [trunk[:cut] + rng.integers(50, size=tail).tolist() for cut, tail in forks]
    forest = pack_forest([*branches, rng.integers(50, size=40).tolist(), [3]])
    end = torch.from_numpy(forest.subtree_end).to(device)
    positions = torch.from_numpy(forest.positions).to(device)
    generator = torch.Generator().manual_seed(0)
    query_heads, count = 2 * variant.group, forest.num_nodes
    shapes = [(count, query_heads, size), (count, 2, size), (count, 2, value_size)]
    shapes += [(count, query_heads, value_size), (query_heads,)]
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    weight, sinks = drawn.pop(3), drawn.pop()
    inputs = [*drawn, *([sinks] if variant.sinks else [])]
    window, scale, softcap = (60 if variant.limit else None), size**-0.5, (2.0 if variant.softcap else None)

    def results(dtype: torch.dtype, triton_kernels: bool) -> dict[str, torch.Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        options = {"scale": scale, "softcap": softcap, "sinks": leaves[3] if variant.sinks else None}
        if triton_kernels:
            tiles = _tiles(variant, device)
            out = attend(*leaves[:3], tree=tree_for(end, None, positions, window), tiles=tiles, **options)
        else:
            out = reference_tree_attention(
                *leaves[:3], subtree_end=end, positions=positions, window=window, **options
            )
        gradients = torch.autograd.grad(out, leaves, weight.to(dtype))
        return dict(zip(("out", "dq", "dk", "dv", "dsinks"), (out, *gradients), strict=False))

    exact, plain, ours = results(torch.float64, False), results(dtype, False), results(dtype, True)
    return deviations_of(ours, plain, exact, dtype)
