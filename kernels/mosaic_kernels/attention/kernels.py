"""Tree attention in Triton: flash-style forward, dQ, and dK/dV, over block lists (blocks.py).

Names of dimensions: BLOCK_Q queries by BLOCK_K keys a tile, D the head size, BLOCK_D the power of two that
holds it. Scores, softmax and accumulators are fp32; logarithms and exponentials are base 2. Rows past the end
are loaded as zeros: as queries they see nothing or multiply zeros, as keys they are hidden by subtree_end 0.
No program writes what another one reads or writes, so there are no atomics and the result is the same every
time. Matrix sizes reach the kernels unspecialised, so that one compilation serves every forest.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = ["num_queries", "num_keys", "window", "num_heads"]  # never specialised


@triton.jit
def _load_tile(base, rows, columns, row_stride, count, D: tl.constexpr):
    """[rows, columns] of a matrix with `count` rows of D values; zeros past the end."""
    inside = rows[:, None] < count
    if columns.shape[0] > D:
        inside = inside & (columns[None, :] < D)
    return tl.load(base + rows[:, None].to(tl.int64) * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_tile(base, tile, rows, columns, row_stride, count, D: tl.constexpr):
    inside = rows[:, None] < count
    if columns.shape[0] > D:
        inside = inside & (columns[None, :] < D)
    pointers = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    accumulator,  # [BLOCK_Q, BLOCK_D] fp32
    highest,  # [BLOCK_Q] fp32: running maximum of the scores
    total,  # [BLOCK_Q] fp32: running sum of exp2(score - highest)
    q,  # [BLOCK_Q, BLOCK_D]
    q_at,  # [BLOCK_Q] packed positions, -1 past the end
    q_depth,  # [BLOCK_Q]
    k_base,
    v_base,
    end_ptr,
    depth_ptr,
    block,
    num_keys,
    window,
    log2_scale,
    k_row_stride,
    v_row_stride,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: one block of keys."""
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_D)
    k = _load_tile(k_base, keys, columns, k_row_stride, num_keys, D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
    if MASKED:
        end = tl.load(end_ptr + keys, mask=keys < num_keys, other=0)
        visible = (keys[None, :] <= q_at[:, None]) & (q_at[:, None] < end[None, :])
        if WINDOW:
            depth = tl.load(depth_ptr + keys, mask=keys < num_keys, other=0)
            visible = visible & (q_depth[:, None] - depth[None, :] < window)
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    # A row that has seen no key yet has no maximum; any finite one gives it weights of zero.
    finite = tl.where(new_highest == float("-inf"), 0.0, new_highest) if MASKED else new_highest
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(highest - finite)
    total = total * shrink + tl.sum(weights, 1)
    v = _load_tile(v_base, keys, columns, v_row_stride, num_keys, D)
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * shrink[:, None], input_precision=PRECISION)
    return accumulator, new_highest, total


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr,  # [Uq, Hq, D]
    k_ptr,  # [U, Hkv, D]
    v_ptr,  # [U, Hkv, D]
    out_ptr,  # [Uq, Hq, D] contiguous
    lse_ptr,  # [Hq, Uq] fp32: log2 of the sum of exp2(scores)
    end_ptr,  # [U] int32
    rows_ptr,  # [Uq] int32
    depth_ptr,  # [U] int32, read with WINDOW
    row_depth_ptr,  # [Uq] int32, read with WINDOW
    work_ptr,  # [query blocks, 4] int32
    blocks_ptr,  # [entries] int32: key blocks
    num_queries,
    num_keys,
    num_heads,  # Hq
    window,
    scale,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    GROUP: tl.constexpr,  # query heads a key head
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one block of queries of one head. Heads are neighbours, to share K and V in L2."""
    head = tl.program_id(0) % num_heads
    work = work_ptr + tl.program_id(0) // num_heads * 4
    block, first, masked, stop = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_D)
    q_at = tl.load(rows_ptr + rows, mask=rows < num_queries, other=-1)
    q_depth = q_at
    if WINDOW:
        q_depth = tl.load(row_depth_ptr + rows, mask=rows < num_queries, other=0)
    q = _load_tile(q_ptr + head.to(tl.int64) * q_head_stride, rows, columns, q_row_stride, num_queries, D)
    k_base = k_ptr + (head // GROUP).to(tl.int64) * k_head_stride
    v_base = v_ptr + (head // GROUP).to(tl.int64) * v_head_stride

    accumulator = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for entry in range(first, masked):
        accumulator, highest, total = _attend(
            accumulator, highest, total, q, q_at, q_depth, k_base, v_base, end_ptr, depth_ptr,
            tl.load(blocks_ptr + entry), num_keys, window, scale * LOG2_E, k_row_stride, v_row_stride,
            D, BLOCK_K, BLOCK_D, False, WINDOW, PRECISION,
        )  # fmt: skip
    for entry in range(masked, stop):
        accumulator, highest, total = _attend(
            accumulator, highest, total, q, q_at, q_depth, k_base, v_base, end_ptr, depth_ptr,
            tl.load(blocks_ptr + entry), num_keys, window, scale * LOG2_E, k_row_stride, v_row_stride,
            D, BLOCK_K, BLOCK_D, True, WINDOW, PRECISION,
        )  # fmt: skip

    total = tl.where(rows < num_queries, total, 1.0)  # every real row has seen itself
    out_base = out_ptr + head * D
    _store_tile(out_base, accumulator / total[:, None], rows, columns, num_heads * D, num_queries, D)
    lse = lse_ptr + head.to(tl.int64) * num_queries + rows
    tl.store(lse, highest + tl.log2(total), mask=rows < num_queries)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    out_ptr,  # [Uq, Hq, D] contiguous
    grad_ptr,  # [Uq, Hq, D]
    delta_ptr,  # [Hq, Uq] fp32: sum of out * grad over D
    num_queries,
    num_heads,
    grad_row_stride,
    grad_head_stride,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: one block of queries of one head."""
    head = tl.program_id(0) % num_heads
    rows = tl.program_id(0) // num_heads * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_D)
    out = _load_tile(out_ptr + head * D, rows, columns, num_heads * D, num_queries, D)
    grad_base = grad_ptr + head.to(tl.int64) * grad_head_stride
    grad = _load_tile(grad_base, rows, columns, grad_row_stride, num_queries, D)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * num_queries + rows, delta, mask=rows < num_queries)


@triton.jit
def _dq_step(
    dq,  # [BLOCK_Q, BLOCK_D] fp32
    q,  # [BLOCK_Q, BLOCK_D]
    grad,  # [BLOCK_Q, BLOCK_D]
    lse,  # [BLOCK_Q] fp32
    delta,  # [BLOCK_Q] fp32
    q_at,  # [BLOCK_Q]
    q_depth,  # [BLOCK_Q]
    k_base,
    v_base,
    end_ptr,
    depth_ptr,
    block,
    num_keys,
    window,
    log2_scale,
    k_row_stride,
    v_row_stride,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_D)
    k = _load_tile(k_base, keys, columns, k_row_stride, num_keys, D)
    v = _load_tile(v_base, keys, columns, v_row_stride, num_keys, D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2_scale
    weights = tl.exp2(scores - lse[:, None])
    if MASKED:
        end = tl.load(end_ptr + keys, mask=keys < num_keys, other=0)
        visible = (keys[None, :] <= q_at[:, None]) & (q_at[:, None] < end[None, :])
        if WINDOW:
            depth = tl.load(depth_ptr + keys, mask=keys < num_keys, other=0)
            visible = visible & (q_depth[:, None] - depth[None, :] < window)
        weights = tl.where(visible, weights, 0.0)
    d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q_ptr,  # [Uq, Hq, D]
    k_ptr,  # [U, Hkv, D]
    v_ptr,  # [U, Hkv, D]
    grad_ptr,  # [Uq, Hq, D] of the output
    lse_ptr,  # [Hq, Uq] fp32
    delta_ptr,  # [Hq, Uq] fp32
    dq_ptr,  # [Uq, Hq, D] contiguous
    end_ptr,  # [U] int32
    rows_ptr,  # [Uq] int32
    depth_ptr,  # [U] int32, read with WINDOW
    row_depth_ptr,  # [Uq] int32, read with WINDOW
    work_ptr,  # [query blocks, 4] int32
    blocks_ptr,  # [entries] int32: key blocks
    num_queries,
    num_keys,
    num_heads,
    window,
    scale,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    grad_row_stride,
    grad_head_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one block of queries of one head, over the same lists as the forward kernel."""
    head = tl.program_id(0) % num_heads
    work = work_ptr + tl.program_id(0) // num_heads * 4
    block, first, masked, stop = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_D)
    q_at = tl.load(rows_ptr + rows, mask=rows < num_queries, other=-1)
    q_depth = q_at
    if WINDOW:
        q_depth = tl.load(row_depth_ptr + rows, mask=rows < num_queries, other=0)
    q = _load_tile(q_ptr + head.to(tl.int64) * q_head_stride, rows, columns, q_row_stride, num_queries, D)
    grad_base = grad_ptr + head.to(tl.int64) * grad_head_stride
    grad = _load_tile(grad_base, rows, columns, grad_row_stride, num_queries, D)
    statistic = head.to(tl.int64) * num_queries + rows
    lse = tl.load(lse_ptr + statistic, mask=rows < num_queries, other=0.0)
    delta = tl.load(delta_ptr + statistic, mask=rows < num_queries, other=0.0)
    k_base = k_ptr + (head // GROUP).to(tl.int64) * k_head_stride
    v_base = v_ptr + (head // GROUP).to(tl.int64) * v_head_stride

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for entry in range(first, masked):
        dq = _dq_step(
            dq, q, grad, lse, delta, q_at, q_depth, k_base, v_base, end_ptr, depth_ptr,
            tl.load(blocks_ptr + entry), num_keys, window, scale * LOG2_E, k_row_stride, v_row_stride,
            D, BLOCK_K, BLOCK_D, False, WINDOW, PRECISION,
        )  # fmt: skip
    for entry in range(masked, stop):
        dq = _dq_step(
            dq, q, grad, lse, delta, q_at, q_depth, k_base, v_base, end_ptr, depth_ptr,
            tl.load(blocks_ptr + entry), num_keys, window, scale * LOG2_E, k_row_stride, v_row_stride,
            D, BLOCK_K, BLOCK_D, True, WINDOW, PRECISION,
        )  # fmt: skip
    _store_tile(dq_ptr + head * D, dq * scale, rows, columns, num_heads * D, num_queries, D)


@triton.jit
def _dkv_step(
    dk,  # [BLOCK_K, BLOCK_D] fp32
    dv,  # [BLOCK_K, BLOCK_D] fp32
    k,  # [BLOCK_K, BLOCK_D]
    v,  # [BLOCK_K, BLOCK_D]
    keys,  # [BLOCK_K]
    end,  # [BLOCK_K]
    depth,  # [BLOCK_K]
    q_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    rows_ptr,
    row_depth_ptr,
    block,
    head,
    num_queries,
    window,
    log2_scale,
    q_row_stride,
    q_head_stride,
    grad_row_stride,
    grad_head_stride,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head; scores are transposed, [BLOCK_K, BLOCK_Q]."""
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_D)
    q = _load_tile(q_ptr + head.to(tl.int64) * q_head_stride, rows, columns, q_row_stride, num_queries, D)
    grad_base = grad_ptr + head.to(tl.int64) * grad_head_stride
    grad = _load_tile(grad_base, rows, columns, grad_row_stride, num_queries, D)
    statistic = head.to(tl.int64) * num_queries + rows
    lse = tl.load(lse_ptr + statistic, mask=rows < num_queries, other=0.0)
    delta = tl.load(delta_ptr + statistic, mask=rows < num_queries, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2_scale
    weights = tl.exp2(scores - lse[None, :])
    if MASKED:
        q_at = tl.load(rows_ptr + rows, mask=rows < num_queries, other=-1)
        visible = (keys[:, None] <= q_at[None, :]) & (q_at[None, :] < end[:, None])
        if WINDOW:
            q_depth = tl.load(row_depth_ptr + rows, mask=rows < num_queries, other=0)
            visible = visible & (q_depth[None, :] - depth[:, None] < window)
        weights = tl.where(visible, weights, 0.0)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
    d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[None, :])
    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def dkv_kernel(
    q_ptr,  # [Uq, Hq, D]
    k_ptr,  # [U, Hkv, D]
    v_ptr,  # [U, Hkv, D]
    grad_ptr,  # [Uq, Hq, D] of the output
    lse_ptr,  # [Hq, Uq] fp32
    delta_ptr,  # [Hq, Uq] fp32
    dk_ptr,  # [U, Hkv, D] contiguous
    dv_ptr,  # [U, Hkv, D] contiguous
    end_ptr,  # [U] int32
    rows_ptr,  # [Uq] int32
    depth_ptr,  # [U] int32, read with WINDOW
    row_depth_ptr,  # [Uq] int32, read with WINDOW
    work_ptr,  # [key blocks, 4] int32
    blocks_ptr,  # [entries] int32: query blocks
    num_queries,
    num_keys,
    num_heads,  # Hkv
    window,
    scale,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    grad_row_stride,
    grad_head_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one block of keys of one key head, over the query blocks of all heads of its group."""
    head = tl.program_id(0) % num_heads
    work = work_ptr + tl.program_id(0) // num_heads * 4
    block, first, masked, stop = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_D)
    end = tl.load(end_ptr + keys, mask=keys < num_keys, other=0)
    depth = end
    if WINDOW:
        depth = tl.load(depth_ptr + keys, mask=keys < num_keys, other=0)
    k = _load_tile(k_ptr + head.to(tl.int64) * k_head_stride, keys, columns, k_row_stride, num_keys, D)
    v = _load_tile(v_ptr + head.to(tl.int64) * v_head_stride, keys, columns, v_row_stride, num_keys, D)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for step in range((masked - first) * GROUP):  # the heads of a group, block by block, as one loop
        entry, member = first + step // GROUP, step % GROUP  # pyrefly: ignore [unsupported-operation]
        dk, dv = _dkv_step(
            dk, dv, k, v, keys, end, depth, q_ptr, grad_ptr, lse_ptr, delta_ptr, rows_ptr, row_depth_ptr,
            tl.load(blocks_ptr + entry), head * GROUP + member, num_queries, window, scale * LOG2_E,
            q_row_stride, q_head_stride, grad_row_stride, grad_head_stride,
            D, BLOCK_Q, BLOCK_D, False, WINDOW, PRECISION,
        )  # fmt: skip
    for step in range((stop - masked) * GROUP):
        entry, member = masked + step // GROUP, step % GROUP  # pyrefly: ignore [unsupported-operation]
        dk, dv = _dkv_step(
            dk, dv, k, v, keys, end, depth, q_ptr, grad_ptr, lse_ptr, delta_ptr, rows_ptr, row_depth_ptr,
            tl.load(blocks_ptr + entry), head * GROUP + member, num_queries, window, scale * LOG2_E,
            q_row_stride, q_head_stride, grad_row_stride, grad_head_stride,
            D, BLOCK_Q, BLOCK_D, True, WINDOW, PRECISION,
        )  # fmt: skip
    _store_tile(dk_ptr + head * D, dk * scale, keys, columns, num_heads * D, num_keys, D)
    _store_tile(dv_ptr + head * D, dv, keys, columns, num_heads * D, num_keys, D)
