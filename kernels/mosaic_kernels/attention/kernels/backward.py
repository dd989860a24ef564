"""The backward kernels: delta, then dQ over the keys and dK/dV over the queries, from the logsumexp."""

import triton
import triton.language as tl

from mosaic_kernels.attention.kernels.parts import SIZES, load_tile, score_slope, score_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    out_ptr,  # [Uq, Hq, V] contiguous
    grad_ptr,  # [Uq, Hq, V]
    delta_ptr,  # [Hq, Uq] fp32: sum of out * grad over V
    num_queries,
    num_heads,
    grad_row_stride,
    grad_head_stride,
    V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program: one block of queries of one head."""
    head = tl.program_id(0) % num_heads
    rows = tl.program_id(0) // num_heads * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_V)
    out = load_tile(out_ptr + head * V, rows, columns, num_heads * V, num_queries, V)
    grad_base = grad_ptr + head.to(tl.int64) * grad_head_stride
    grad = load_tile(grad_base, rows, columns, grad_row_stride, num_queries, V)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * num_queries + rows, delta, mask=rows < num_queries)


@triton.jit
def _dq_step(
    dq,  # [BLOCK_Q, BLOCK_D] fp32
    q,  # [BLOCK_Q, BLOCK_D]
    grad,  # [BLOCK_Q, BLOCK_V]
    lse,  # [BLOCK_Q] fp32
    delta,  # [BLOCK_Q] fp32
    q_at,  # [BLOCK_Q]
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
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k = load_tile(k_base, keys, tl.arange(0, BLOCK_D), k_row_stride, num_keys, D)
    v = load_tile(v_base, keys, tl.arange(0, BLOCK_V), v_row_stride, num_keys, V)
    scores = score_tile(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, SOFTCAP)
    weights = tl.exp2(scores - lse[:, None])
    if MASKED:
        end = tl.load(end_ptr + keys, mask=keys < num_keys, other=0)
        visible = (keys[None, :] <= q_at[:, None]) & (q_at[:, None] < end[None, :])
        if LIMIT:
            limit = tl.load(limit_ptr + keys, mask=keys < num_keys, other=0)
            visible = visible & (q_depth[:, None] < limit[None, :])
        weights = tl.where(visible, weights, 0.0)
    if SOFTCAP:
        weights *= score_slope(scores, softcap)
    d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q_ptr,  # [Uq, Hq, D]
    k_ptr,  # [U, Hkv, D]
    v_ptr,  # [U, Hkv, V]
    grad_ptr,  # [Uq, Hq, V] of the output
    lse_ptr,  # [Hq, Uq] fp32
    delta_ptr,  # [Hq, Uq] fp32
    dq_ptr,  # [Uq, Hq, D] contiguous
    end_ptr,  # [U] int32
    rows_ptr,  # [Uq] int32
    limit_ptr,  # [U] int32: the first depth that no longer sees the key, read with LIMIT
    row_depth_ptr,  # [Uq] int32, read with LIMIT
    work_ptr,  # [query blocks, 4] int32
    blocks_ptr,  # [entries + 1] int32: key blocks
    num_queries,
    num_keys,
    num_heads,
    scale,
    softcap,
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
    V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LIMIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one block of queries of one head, over the same lists as the forward kernel."""
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
    grad_base = grad_ptr + head.to(tl.int64) * grad_head_stride
    grad = load_tile(grad_base, rows, tl.arange(0, BLOCK_V), grad_row_stride, num_queries, V)
    statistic = head.to(tl.int64) * num_queries + rows
    lse = tl.load(lse_ptr + statistic, mask=rows < num_queries, other=0.0)
    delta = tl.load(delta_ptr + statistic, mask=rows < num_queries, other=0.0)
    k_base = k_ptr + (head // GROUP).to(tl.int64) * k_head_stride
    v_base = v_ptr + (head // GROUP).to(tl.int64) * v_head_stride

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    block = tl.load(blocks_ptr + first)
    for entry in range(first, masked):
        following = tl.load(blocks_ptr + entry + 1)
        dq = _dq_step(
            dq, q, grad, lse, delta, q_at, q_depth, k_base, v_base, end_ptr, limit_ptr,
            block, num_keys, scale, softcap, k_row_stride, v_row_stride,
            D, V, BLOCK_K, BLOCK_D, BLOCK_V, False, LIMIT, SOFTCAP, PRECISION,
        )  # fmt: skip
        block = following
    for entry in range(masked, stop):
        following = tl.load(blocks_ptr + entry + 1)
        dq = _dq_step(
            dq, q, grad, lse, delta, q_at, q_depth, k_base, v_base, end_ptr, limit_ptr,
            block, num_keys, scale, softcap, k_row_stride, v_row_stride,
            D, V, BLOCK_K, BLOCK_D, BLOCK_V, True, LIMIT, SOFTCAP, PRECISION,
        )  # fmt: skip
        block = following
    store_tile(dq_ptr + head * D, dq * scale, rows, columns, num_heads * D, num_queries, D)


@triton.jit
def _dkv_step(
    dk,  # [BLOCK_K, BLOCK_D] fp32
    dv,  # [BLOCK_K, BLOCK_V] fp32
    k,  # [BLOCK_K, BLOCK_D]
    v,  # [BLOCK_K, BLOCK_V]
    keys,  # [BLOCK_K]
    end,  # [BLOCK_K]
    limit,  # [BLOCK_K]
    q_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    rows_ptr,
    row_depth_ptr,
    block,
    head,
    num_queries,
    scale,
    softcap,
    q_row_stride,
    q_head_stride,
    grad_row_stride,
    grad_head_stride,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
    LIMIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One block of queries of one head; scores are transposed, [BLOCK_K, BLOCK_Q]."""
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_D)
    q = load_tile(q_ptr + head.to(tl.int64) * q_head_stride, rows, columns, q_row_stride, num_queries, D)
    grad_base = grad_ptr + head.to(tl.int64) * grad_head_stride
    grad = load_tile(grad_base, rows, tl.arange(0, BLOCK_V), grad_row_stride, num_queries, V)
    statistic = head.to(tl.int64) * num_queries + rows
    lse = tl.load(lse_ptr + statistic, mask=rows < num_queries, other=0.0)
    scores = score_tile(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap, SOFTCAP)
    weights = tl.exp2(scores - lse[None, :])
    if MASKED:
        q_at = tl.load(rows_ptr + rows, mask=rows < num_queries, other=-1)
        visible = (keys[:, None] <= q_at[None, :]) & (q_at[None, :] < end[:, None])
        if LIMIT:
            q_depth = tl.load(row_depth_ptr + rows, mask=rows < num_queries, other=0)
            visible = visible & (q_depth[None, :] < limit[:, None])
        weights = tl.where(visible, weights, 0.0)
    if VALUES:
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
    if KEYS:
        delta = tl.load(delta_ptr + statistic, mask=rows < num_queries, other=0.0)
        if SOFTCAP:
            weights *= score_slope(scores, softcap)
        d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        d_scores = weights * (d_weights - delta[None, :])
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def dkv_kernel(
    q_ptr,  # [Uq, Hq, D]
    k_ptr,  # [U, Hkv, D]
    v_ptr,  # [U, Hkv, V]
    grad_ptr,  # [Uq, Hq, V] of the output
    lse_ptr,  # [Hq, Uq] fp32
    delta_ptr,  # [Hq, Uq] fp32
    dk_ptr,  # [U, Hkv, D] contiguous
    dv_ptr,  # [U, Hkv, V] contiguous
    end_ptr,  # [U] int32
    rows_ptr,  # [Uq] int32
    limit_ptr,  # [U] int32: the first depth that no longer sees the key, read with LIMIT
    row_depth_ptr,  # [Uq] int32, read with LIMIT
    work_ptr,  # [key blocks, 4] int32
    blocks_ptr,  # [entries + 1] int32: query blocks
    num_queries,
    num_keys,
    num_heads,  # Hkv
    scale,
    softcap,
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
    V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LIMIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,  # whether dK is made
    VALUES: tl.constexpr,  # whether dV is made
):
    """One program: one block of keys of one key head, over the query blocks of all heads of its group."""
    head = tl.program_id(0) % num_heads
    work = work_ptr + tl.program_id(0) // num_heads * 4
    k_block, first, masked, stop = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    keys = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_D)
    end = tl.load(end_ptr + keys, mask=keys < num_keys, other=0)
    limit = end
    if LIMIT:
        limit = tl.load(limit_ptr + keys, mask=keys < num_keys, other=0)
    k = load_tile(k_ptr + head.to(tl.int64) * k_head_stride, keys, columns, k_row_stride, num_keys, D)
    value_columns = tl.arange(0, BLOCK_V)
    v = load_tile(v_ptr + head.to(tl.int64) * v_head_stride, keys, value_columns, v_row_stride, num_keys, V)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    block = tl.load(blocks_ptr + first)
    for step in range((masked - first) * GROUP):  # the heads of a group, block by block, as one loop
        following = tl.load(blocks_ptr + first + (step + 1) // GROUP)  # pyrefly: ignore [unsupported-operation]
        dk, dv = _dkv_step(
            dk, dv, k, v, keys, end, limit, q_ptr, grad_ptr, lse_ptr, delta_ptr, rows_ptr, row_depth_ptr,
            block, head * GROUP + step % GROUP,  # pyrefly: ignore [unsupported-operation]
            num_queries, scale, softcap, q_row_stride, q_head_stride, grad_row_stride, grad_head_stride,
            D, V, BLOCK_Q, BLOCK_D, BLOCK_V, False, LIMIT, SOFTCAP, PRECISION, KEYS, VALUES,
        )  # fmt: skip
        block = following
    for step in range((stop - masked) * GROUP):
        following = tl.load(blocks_ptr + masked + (step + 1) // GROUP)  # pyrefly: ignore [unsupported-operation]
        dk, dv = _dkv_step(
            dk, dv, k, v, keys, end, limit, q_ptr, grad_ptr, lse_ptr, delta_ptr, rows_ptr, row_depth_ptr,
            block, head * GROUP + step % GROUP,  # pyrefly: ignore [unsupported-operation]
            num_queries, scale, softcap, q_row_stride, q_head_stride, grad_row_stride, grad_head_stride,
            D, V, BLOCK_Q, BLOCK_D, BLOCK_V, True, LIMIT, SOFTCAP, PRECISION, KEYS, VALUES,
        )  # fmt: skip
        block = following
    if KEYS:
        store_tile(dk_ptr + head * D, dk * scale, keys, columns, num_heads * D, num_keys, D)
    if VALUES:
        store_tile(dv_ptr + head * V, dv, keys, value_columns, num_heads * V, num_keys, V)
