"""RMSNorm and rotary embedding with gradients of their own: fewer passes over memory than autograd's.

transformers writes both as chains of small operations, and autograd makes a chain of each one's backward
pass, with a slow sum over rows for the weight's gradient. As one operation a norm keeps its input and one
number a row, and sums by products of a matrix and a vector. Both take some rows at a time through all of
their steps, so that what lies between these stays in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_NUMBERS = 2**18  # numbers of a tensor that are worked on at a time, 1 MiB in fp32


def rms_norm(
    x: Tensor,  # [..., D] or, of heads, [1, U, H, D]; fp32 or fp64
    weight: Tensor,  # [D]
    eps: float,
) -> Tensor:  # [..., D]
    """weight x / sqrt(mean(x^2) + eps), over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""
    return _RmsNorm.apply(x, weight, eps)


def rotate(
    x: Tensor,  # [1, U, H, D]
    cos: Tensor,  # [1, U, R], R at most D and even
    sin: Tensor,  # [1, U, R]
) -> Tensor:  # [1, U, H, D]
    """x with its first R numbers a head rotated, halves as pairs: x cos + (-x2, x1) sin; the rest as it is.

    The convention of the Llama family (Su et al., arXiv 2104.09864, with halves in place of neighbours).
    """
    return _Rotate.apply(x, cos.unsqueeze(2), sin.unsqueeze(2))


class _RmsNorm(torch.autograd.Function):
    """With s = 1 / sqrt(mean(x^2) + eps) of a row: dx = s (w dy - x s^2 mean(w dy x)), dw = sum of s x dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows_of_heads(x)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        scale = rows.new_empty(*rows.shape[:2], 1)
        for block in _blocks(rows):
            x_block, scales = rows[block], scale[block]
            torch.linalg.vector_norm(x_block, dim=2, keepdim=True, out=scales)
            scales.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(x_block, scales, out=out[block]).mul_(weight)
        ctx.save_for_backward(rows, weight, scale)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        grad = _rows_of_heads(grad_outputs[0])
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = grad.new_empty(grad.shape) if needs_x else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        for block in _blocks(rows):
            dy, x, scales = grad[block], rows[block], scale[block]
            product = (dy * x).reshape(-1, x.shape[2])
            if grad_x is not None:
                along = torch.mv(product, weight).view(scales.shape).mul_(scales).mul_(scales)
                torch.mul(dy, weight, out=grad_x[block]).addcmul_(x, along.div_(-x.shape[2])).mul_(scales)
            if grad_weight is not None:
                grad_weight.addmv_(product.T, scales.view(-1))
        return None if grad_x is None else grad_x.view(grad_outputs[0].shape), grad_weight, None


class _Rotate(torch.autograd.Function):
    """The transpose of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # The first half's gradient has the second's sine, as the transpose of the matrix has it.
        return _turned(grad_outputs[0], cos, sin.roll(cos.shape[-1] // 2, -1), -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """(x1 cos1 - sign x2 sin1, x2 cos2 + sign x1 sin2), and the rest of a head as it is.

    The halves are swapped first: two products of whole heads take less than four of halves.
    """
    rotated = x.new_empty(x.shape)
    width, half = cos.shape[-1], cos.shape[-1] // 2
    signed = torch.cat([sin[..., :half] * -sign, sin[..., half:] * sign], dim=-1)
    size = max(1, BLOCK_NUMBERS // max(1, x[0, :1].numel()))
    swapped = x.new_empty(1, min(size, x.shape[1]), x.shape[2], width)
    for start in range(0, x.shape[1], size):
        block = slice(start, start + size)
        of_block, out = x[:, block], rotated[:, block]
        turned = swapped[:, : of_block.shape[1]]
        turned[..., :half] = of_block[..., half:width]
        turned[..., half:] = of_block[..., :half]
        torch.mul(of_block[..., :width], cos[:, block], out=out[..., :width]).addcmul_(
            turned, signed[:, block]
        )
        if width < x.shape[-1]:
            out[..., width:] = of_block[..., width:]
    return rotated


def _rows_of_heads(x: Tensor) -> Tensor:
    """[1, U, H, D] -> [U, H, D], of any strides without a copy; [..., D] -> [N, 1, D]."""
    return x.reshape(-1, *x.shape[-2:]) if x.ndim == 4 else x.reshape(-1, 1, x.shape[-1])


def _blocks(rows: Tensor) -> Iterator[slice]:  # of [N, H, D]
    size = max(1, BLOCK_NUMBERS // max(1, rows[:1].numel()))
    for start in range(0, len(rows), size):
        yield slice(start, start + size)
