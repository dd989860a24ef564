"""Preference losses in Triton: margins of rollouts, losses of pairs, and back from pairs to tokens or edges.

Sums run over lists in a fixed order, one program or lane each: no atomics, and no two runs differ.
"""

import triton
import triton.language as tl

SIZES = ["num_pairs"]


@triton.jit
def margin_kernel(
    logprobs_ptr,  # [T], or [E] with EDGES: the policy's
    edge_of_token_ptr,  # [T] int32, -1 where the policy's log-prob is not counted; read with EDGES
    reference_ptr,  # [T], read with REFERENCE
    mask_ptr,  # [T] uint8
    cu_seqlens_ptr,  # [R + 1] int64
    margin_ptr,  # [R] fp32
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    REFERENCE: tl.constexpr,
):
    """One program: one rollout's sum of policy minus reference. Masked values are never read."""
    rollout = tl.program_id(0)
    first, stop = tl.load(cu_seqlens_ptr + rollout), tl.load(cu_seqlens_ptr + rollout + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, stop, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        counted = tl.load(mask_ptr + tokens, mask=tokens < stop, other=0) != 0
        if EDGES:
            edges = tl.load(edge_of_token_ptr + tokens, mask=tokens < stop, other=-1)
            total += tl.load(logprobs_ptr + edges, mask=edges >= 0, other=0.0).to(tl.float32)
        else:
            total += tl.load(logprobs_ptr + tokens, mask=counted, other=0.0).to(tl.float32)
        if REFERENCE:
            total -= tl.load(reference_ptr + tokens, mask=counted, other=0.0).to(tl.float32)
    tl.store(margin_ptr + rollout, tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES)
def pair_kernel(
    margin_ptr,  # [R] fp32
    pairs_ptr,  # [P, 2] int32
    preference_ptr,  # [P] fp32
    loss_ptr,  # [P] fp32
    slope_ptr,  # [P] fp32: dloss / d(margin of the first)
    num_pairs,
    beta,
    BLOCK: tl.constexpr,
):
    """-p log sigmoid(x) - (1 - p) log sigmoid(-x) with x = beta (margin_i - margin_j), and its derivative."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    i = tl.load(pairs_ptr + 2 * pair, mask=inside, other=0)
    j = tl.load(pairs_ptr + 2 * pair + 1, mask=inside, other=0)
    p = tl.load(preference_ptr + pair, mask=inside, other=0.0)
    margin_i = tl.load(margin_ptr + i, mask=inside, other=0.0)
    x = beta * (margin_i - tl.load(margin_ptr + j, mask=inside, other=0.0))
    decay = tl.exp(-tl.abs(x))
    # log(1 + decay): below 1/32 the sum would drop digits of decay, which the series keeps.
    series = decay * (1 - decay * (1 / 2 - decay * (1 / 3 - decay * (1 / 4 - decay / 5))))
    tail = tl.where(decay < 1 / 32, series, tl.log(1 + decay))
    # log sigmoid(x) = min(x, 0) - tail, whatever the sign of x.
    loss = tail + p * tl.maximum(-x, 0.0) + (1 - p) * tl.maximum(x, 0.0)
    likely, unlikely = 1 / (1 + decay), decay / (1 + decay)
    rising, falling = tl.where(x > 0, likely, unlikely), tl.where(x > 0, unlikely, likely)
    loss = tl.where(x != x, x, loss)  # the maximum drops a NaN
    tl.store(loss_ptr + pair, loss, mask=inside)
    tl.store(slope_ptr + pair, beta * ((1 - p) * rising - p * falling), mask=inside)


@triton.jit
def margin_gradient_kernel(
    grad_loss_ptr,  # [P] fp32
    slope_ptr,  # [P] fp32
    sides_ptr,  # [2P] int32: indices into the flat pairs, rollout by rollout; an even one is a pair's first
    starts_ptr,  # [R + 1] int32
    mask_ptr,  # [T] uint8, read with TOKENS
    cu_seqlens_ptr,  # [R + 1] int64, read with TOKENS
    out_ptr,  # [R] fp32, or [T] fp32 with TOKENS
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One program: one rollout's gradient over all its pairs; with TOKENS, handed to each counted token."""
    rollout = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    stop = tl.load(starts_ptr + rollout + 1)
    for start in range(tl.load(starts_ptr + rollout), stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        side = tl.load(sides_ptr + at, mask=at < stop, other=0)
        grad = tl.load(grad_loss_ptr + side // 2, mask=at < stop, other=0.0)
        grad *= tl.load(slope_ptr + side // 2, mask=at < stop, other=0.0)
        total += tl.where(side % 2 == 0, grad, -grad)
    gradient = tl.sum(total, 0)
    if TOKENS:
        last = tl.load(cu_seqlens_ptr + rollout + 1)
        for start in range(tl.load(cu_seqlens_ptr + rollout), last, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            counted = tl.load(mask_ptr + tokens, mask=tokens < last, other=0) != 0
            tl.store(out_ptr + tokens, tl.where(counted, gradient, 0.0), mask=tokens < last)
    else:
        tl.store(out_ptr + rollout, gradient)
