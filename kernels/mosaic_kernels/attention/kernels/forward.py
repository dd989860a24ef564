"""The forward kernel: one pass over the keys by an online softmax."""

import triton
import triton.language as tl

from mosaic_kernels.attention.kernels.parts import LOG2_E, SIZES, load_tile, score_tile, store_tile


@triton.jit
def _attend(
    accumulator,  # [BLOCK_Q, BLOCK_V] fp32
    highest,  # [BLOCK_Q] fp32: running maximum of the scores
    total,  # [BLOCK_Q] fp32: running sum of exp2(score - highest)
    q,  # [BLOCK_Q, BLOCK_D]
    q_at,  # [BLOCK_Q] packed positions, -1 past the end
    q_depth,  # [BLOCK_Q]
    k_base,
    v_base,
    end_ptr,
    limit_ptr,
    block,
    num_keys,
    scale,
    softcap,
    k_row_stride,
    v_row_stride,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
    LIMIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: one block of keys."""
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_D)
    k = load_tile(k_base, keys, columns, k_row_stride, num_keys, D)
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = score_tile(products, scale, softcap, SOFTCAP)
    if MASKED:
        end = tl.load(end_ptr + keys, mask=keys < num_keys, other=0)
        visible = (keys[None, :] <= q_at[:, None]) & (q_at[:, None] < end[None, :])
        if LIMIT:
            limit = tl.load(limit_ptr + keys, mask=keys < num_keys, other=0)
            visible = visible & (q_depth[:, None] < limit[None, :])
        scores = tl.where(visible, scores, float("-inf"))
    if MASKED or SOFTCAP:
        block_highest = tl.max(scores, 1)
    else:  # only the exponential reads the scores then, and scaling them is part of its multiply-add
        block_highest = tl.max(products, 1) * (scale * LOG2_E)
    new_highest = tl.maximum(highest, block_highest)
    # A row that has seen no key yet has no maximum; any finite one gives it weights of zero.
    finite = tl.where(new_highest == float("-inf"), 0.0, new_highest) if MASKED else new_highest
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(highest - finite)
    total = total * shrink + tl.sum(weights, 1)
    v = load_tile(v_base, keys, tl.arange(0, BLOCK_V), v_row_stride, num_keys, V)
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * shrink[:, None], input_precision=PRECISION)
    return accumulator, new_highest, total


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr,  # [Uq, Hq, D]
    k_ptr,  # [U, Hkv, D]
    v_ptr,  # [U, Hkv, V]
    sinks_ptr,  # [Hq] fp32, read with SINKS
    out_ptr,  # [Uq, Hq, V] contiguous
    lse_ptr,  # [Hq, Uq] fp32: log2 of the sum of exp2(scores)
    end_ptr,  # [U] int32
    rows_ptr,  # [Uq] int32
    limit_ptr,  # [U] int32: the first depth that no longer sees the key, read with LIMIT
    row_depth_ptr,  # [Uq] int32, read with LIMIT
    work_ptr,  # [query blocks, 4] int32
    blocks_ptr,  # [entries + 1] int32: key blocks
    num_queries,
    num_keys,
    num_heads,  # Hq
    scale,
    softcap,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    GROUP: tl.constexpr,  # query heads a key head
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LIMIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one block of queries of one head. Heads are neighbours, to share K and V in L2."""
    head = tl.program_id(0) % num_heads
    work = work_ptr + tl.program_id(0) // num_heads * 4
    q_block, first, masked, stop = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    rows = q_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_D)
    q_at = tl.load(rows_ptr + rows, mask=rows < num_queries, other=-1)
    q_depth = q_at
    if LIMIT:
        q_depth = tl.load(row_depth_ptr + rows, mask=rows < num_queries, other=0)
    q = load_tile(q_ptr + head.to(tl.int64) * q_head_stride, rows, columns, q_row_stride, num_queries, D)
    k_base = k_ptr + (head // GROUP).to(tl.int64) * k_head_stride
    v_base = v_ptr + (head // GROUP).to(tl.int64) * v_head_stride

    accumulator = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    if SINKS:  # a key before all others, whose value is 0
        highest = tl.zeros([BLOCK_Q], tl.float32) + tl.load(sinks_ptr + head) * LOG2_E
        total += 1.0
    block = tl.load(blocks_ptr + first)
    for entry in range(first, masked):
        following = tl.load(blocks_ptr + entry + 1)
        accumulator, highest, total = _attend(
            accumulator, highest, total, q, q_at, q_depth, k_base, v_base, end_ptr, limit_ptr,
            block, num_keys, scale, softcap, k_row_stride, v_row_stride,
            D, V, BLOCK_K, BLOCK_D, BLOCK_V, False, LIMIT, SOFTCAP, PRECISION,
        )  # fmt: skip
        block = following
    for entry in range(masked, stop):
        following = tl.load(blocks_ptr + entry + 1)
        accumulator, highest, total = _attend(
            accumulator, highest, total, q, q_at, q_depth, k_base, v_base, end_ptr, limit_ptr,
            block, num_keys, scale, softcap, k_row_stride, v_row_stride,
            D, V, BLOCK_K, BLOCK_D, BLOCK_V, True, LIMIT, SOFTCAP, PRECISION,
        )  # fmt: skip
        block = following

    total = tl.where(rows < num_queries, total, 1.0)  # every real row has seen itself
    out_base = out_ptr + head * V
    out = accumulator / total[:, None]
    store_tile(out_base, out, rows, tl.arange(0, BLOCK_V), num_heads * V, num_queries, V)
    lse = lse_ptr + head.to(tl.int64) * num_queries + rows
    tl.store(lse, highest + tl.log2(total), mask=rows < num_queries)
