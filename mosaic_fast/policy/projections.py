"""Queries, keys and values by one matrix product in place of three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mosaic_fast.policy.layout import is_plain_linear


def can_be_joined(x: Tensor, modules: Sequence[nn.Module]) -> bool:
    """True if the modules are nothing but matrices and biases of the dtype of x, fp32 or fp64.

    Either all of them have a bias or none has.
    """
    return (
        x.dtype.itemsize >= 4
        and all(is_plain_linear(one) and one.weight.dtype == x.dtype for one in modules)
        and len({one.bias is None for one in modules}) == 1
    )


def joined(x: Tensor, modules: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """What each module gives for x [1, U, D]: views [1, U, F] of one result."""
    weights = [one.weight for one in modules]
    biases = [one.bias for one in modules if one.bias is not None]
    parts = _Joined.apply(x[0], len(weights), *weights, *biases)
    return tuple(part[None] for part in parts)


class _Joined(torch.autograd.Function):
    """The joined matrix is made anew in the backward pass: to keep it would take a copy of the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = parameters[:count], parameters[count:]
        weight = torch.cat(weights)
        out = torch.addmm(torch.cat(biases), x, weight.T) if biases else x @ weight.T
        ctx.save_for_backward(x, *weights)
        return out.split([len(one) for one in weights], dim=1)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad = torch.cat(grad_outputs, dim=1)
        needs_x, _, *needs = ctx.needs_input_grad
        sizes, count = [len(one) for one in weights], len(weights)
        grad_x = grad @ torch.cat(weights) if needs_x else None
        grad_weights = (grad.T @ x).split(sizes) if any(needs[:count]) else [None] * count
        grad_biases = grad.sum(0).split(sizes) if any(needs[count:]) else [None] * (len(needs) - count)
        of_parameters = zip([*grad_weights, *grad_biases], needs, strict=True)
        return grad_x, None, *(one if needed else None for one, needed in of_parameters)
