"""The clipped surrogate in Triton: one pass over the tokens gives each loss and its derivative."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def surrogate_kernel(
    policy_ptr,  # [T]
    start_ptr,  # [T]
    advantages_ptr,  # [T]
    weights_ptr,  # [T]
    reference_ptr,  # [T], read with KL
    loss_ptr,  # [T] fp32
    slope_ptr,  # [T] fp32: dloss/dpolicy
    count,
    lowest,  # 1 - clip_low
    highest,  # 1 + clip_high
    kl_weight,
    BLOCK: tl.constexpr,
    KL: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights_ptr + tokens, mask=tokens < count, other=0.0).to(tl.float32)
    counted = weight != 0.0  # what has no weight is not read
    policy = tl.load(policy_ptr + tokens, mask=counted, other=0.0).to(tl.float32)
    start = tl.load(start_ptr + tokens, mask=counted, other=0.0).to(tl.float32)
    advantage = tl.load(advantages_ptr + tokens, mask=counted, other=0.0).to(tl.float32)
    ratio = tl.exp(policy - start)
    above = (advantage >= 0.0) & (ratio > highest)
    below = (advantage <= 0.0) & (ratio < lowest)
    loss = -advantage * tl.where(above, highest, tl.where(below, lowest, ratio))
    slope = tl.where(above | below, 0.0, -advantage * ratio)
    if KL:
        d = tl.load(reference_ptr + tokens, mask=counted, other=0.0).to(tl.float32) - policy
        # Near 0 exp(d) - d - 1 would leave no digits; seven terms of its series have all.
        higher = 1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040 + d * (1 / 40320))))
        series = d * d * (0.5 + d * (1 / 6 + d * higher))
        near = tl.abs(d) < 0.5
        k3 = tl.where(near, series, (tl.exp(d) - 1) - d)
        loss += kl_weight * k3
        slope -= kl_weight * tl.where(near, d + series, tl.exp(d) - 1)
    tl.store(loss_ptr + tokens, tl.where(counted, weight * loss, 0.0), mask=tokens < count)
    tl.store(slope_ptr + tokens, tl.where(counted, weight * slope, 0.0), mask=tokens < count)
