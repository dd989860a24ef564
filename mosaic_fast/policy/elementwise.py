"""RMSNorm and rotary embedding with gradients of their own: fewer passes over memory than autograd's.

transformers writes both as chains of small operations, and autograd makes a chain of each one's backward
pass, with a slow sum over rows for the weight's gradient. As one operation a norm keeps its input and one
number a row, and sums by products of a matrix and a vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(
    x: Tensor,  # [..., D] fp32 or fp64
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
        rows = x.reshape(-1, x.shape[-1])
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        scale = norm.square_().div_(rows.shape[1]).add_(eps).rsqrt_()  # [rows, 1]
        ctx.save_for_backward(rows, weight, scale)
        return (rows * scale).mul_(weight).view(x.shape)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        grad = grad_outputs[0].reshape(rows.shape)
        product = grad * rows
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            along = torch.mv(product, weight).unsqueeze(1).mul_(scale).mul_(scale).div_(-rows.shape[1])
            grad_x = torch.mul(grad, weight).addcmul_(rows, along).mul_(scale).reshape(grad_outputs[0].shape)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mv(product.T, scale[:, 0])
        return grad_x, grad_weight, None


class _Rotate(torch.autograd.Function):
    """The transpose of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotated = torch.empty_like(x)
        (x1, x2), (out1, out2) = _halves(x, cos), _halves(rotated, cos)
        (cos1, cos2), (sin1, sin2) = _halves(cos, cos), _halves(sin, cos)
        torch.mul(x1, cos1, out=out1).addcmul_(x2, sin1, value=-1)
        torch.mul(x2, cos2, out=out2).addcmul_(x1, sin2)
        rotated[..., cos.shape[-1] :] = x[..., cos.shape[-1] :]
        return rotated

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grad_outputs[0]
        back = torch.empty_like(grad)
        (grad1, grad2), (back1, back2) = _halves(grad, cos), _halves(back, cos)
        (cos1, cos2), (sin1, sin2) = _halves(cos, cos), _halves(sin, cos)
        torch.mul(grad1, cos1, out=back1).addcmul_(grad2, sin2)
        torch.mul(grad2, cos2, out=back2).addcmul_(grad1, sin1, value=-1)
        back[..., cos.shape[-1] :] = grad[..., cos.shape[-1] :]
        return back, None, None


def _halves(x: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of the first R numbers, R those of the cosines."""
    half = cos.shape[-1] // 2
    return x[..., :half], x[..., half : 2 * half]
