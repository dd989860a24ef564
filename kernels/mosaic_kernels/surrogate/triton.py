"""The clipped surrogate in Triton: one pass over the tokens gives each loss and its derivative.

The clipped surrogate by its Triton kernel. Bound by memory: 4 or 5 numbers read a token, 2 written.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from mosaic_kernels.dispatch import launch
from mosaic_kernels.selfcheck import Deviation, check_once, deviations_of
from mosaic_kernels.surrogate.reference import reference_clipped_surrogate


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


BLOCK = 1024


def triton_clipped_surrogate(
    policy_logprobs: torch.Tensor,  # [T] bf16, fp16 or fp32
    old_logprobs: torch.Tensor,  # [T]
    advantages: torch.Tensor,  # [T]
    weights: torch.Tensor,  # [T]
    reference_logprobs: torch.Tensor | None,  # [T] None: no KL term
    clip_low: float,
    clip_high: float,
    kl_weight: float,
) -> torch.Tensor:  # [T] fp32
    """Computed in fp32; ValueError for fp64 log-probs."""
    if policy_logprobs.dtype == torch.float64:
        raise ValueError(
            "clipped_surrogate: backend='triton' computes in fp32; for fp64 use backend='reference'"
        )
    variant = (policy_logprobs.dtype, reference_logprobs is not None)
    check_once("clipped_surrogate", policy_logprobs.device, variant, deviations)
    return _Surrogate.apply(
        policy_logprobs, old_logprobs, advantages, weights, reference_logprobs,
        1 - clip_low, 1 + clip_high, kl_weight,
    )  # fmt: skip


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy: torch.Tensor,  # [T]
        start: torch.Tensor,  # [T]
        advantages: torch.Tensor,  # [T]
        weights: torch.Tensor,  # [T]
        reference: torch.Tensor | None,  # [T]
        lowest: float,
        highest: float,
        kl_weight: float,
    ) -> torch.Tensor:
        policy, start, advantages, weights = (x.contiguous() for x in (policy, start, advantages, weights))
        loss = torch.empty(len(policy), dtype=torch.float32, device=policy.device)
        slope = torch.empty_like(loss)
        if len(policy):
            launch(
                surrogate_kernel, -(-len(policy) // BLOCK),
                policy, start, advantages, weights, policy if reference is None else reference.contiguous(),
                loss, slope,
                len(policy), float(lowest), float(highest), float(kl_weight),
                BLOCK=BLOCK, KL=reference is not None,
            )  # fmt: skip
        ctx.save_for_backward(slope)
        ctx.dtype = policy.dtype
        return loss

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        # Not grad * slope alone: a token without weight stays out of it even if its gradient is inf.
        grad = torch.where(slope == 0, 0.0, grad_outputs[0] * slope)
        return grad.to(ctx.dtype), *[None] * 7


def deviations(device: torch.device, variant: Hashable) -> Mapping[str, Deviation]:
    """The self-check: losses and gradients of random tokens, some without weight, against fp64.

    variant is the dtype of the policy's log-probs, and whether there is a KL term.
    """
    policy_dtype, with_kl = variant  # pyrefly: ignore [not-iterable]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(5, 3000, generator=generator)
    drawn[3] = drawn[3].clamp(min=0)
    policy, start, advantages, weights, reference = (x.to(device) for x in drawn)
    policy = policy.to(policy_dtype)
    clip_low, clip_high, kl_weight = 0.2, 0.3, 0.1

    def results(dtype: torch.dtype, triton_kernel: bool) -> dict[str, torch.Tensor]:
        leaf = policy.to(policy_dtype if triton_kernel else dtype, copy=True).requires_grad_()
        if triton_kernel:
            loss = _Surrogate.apply(
                leaf, start, advantages, weights, reference if with_kl else None,
                1 - clip_low, 1 + clip_high, kl_weight,
            )  # fmt: skip
        else:
            loss = reference_clipped_surrogate(
                leaf, start, advantages, weights, reference if with_kl else None,
                clip_low, clip_high, kl_weight,
            )  # fmt: skip
        return {"loss": loss, "dpolicy": torch.autograd.grad(loss.sum(), leaf)[0]}

    fp32 = torch.float32
    exact = results(torch.float64, False)
    return deviations_of(results(fp32, True), results(fp32, False), exact, policy_dtype)
