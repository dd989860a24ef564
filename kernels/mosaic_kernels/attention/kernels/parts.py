"""What the forward and the backward kernels share: tiles in and out of memory, and the scores."""

import triton
import triton.language as tl

from mosaic_kernels.tanh import tanh

LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = ["num_queries", "num_keys", "num_heads"]  # never specialised


@triton.jit
def load_tile(base, rows, columns, row_stride, count, D: tl.constexpr):
    """[rows, columns] of a matrix with `count` rows of D values; zeros past the end."""
    inside = rows[:, None] < count
    if columns.shape[0] > D:
        inside = inside & (columns[None, :] < D)
    return tl.load(base + rows[:, None].to(tl.int64) * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, tile, rows, columns, row_stride, count, D: tl.constexpr):
    inside = rows[:, None] < count
    if columns.shape[0] > D:
        inside = inside & (columns[None, :] < D)
    pointers = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def score_tile(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in base 2 from products of queries and keys, bent by the softcap where there is one."""
    if SOFTCAP:
        return tanh(products * (scale / softcap)) * (softcap * LOG2_E)
    return products * (scale * LOG2_E)


@triton.jit
def score_slope(scores, softcap):
    """The softcap's derivative 1 - tanh^2 at scores in base 2."""
    bent = scores * (1 / (softcap * LOG2_E))
    return 1 - bent * bent
