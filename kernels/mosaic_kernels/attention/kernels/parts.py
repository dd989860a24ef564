"""What the forward and the backward kernels share: tiles in and out of memory."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = ["num_queries", "num_keys", "window", "num_heads"]  # never specialised


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
