"""Faster products on a CPU: queries, keys and values by one product in place of three, and the MLP by blocks.

A gated MLP is run in blocks of rows, whose hidden activations stay in the processor's caches. As whole
matrices the activations of some thousand tokens are written to memory and read again by every
elementwise operation between the products. A block of rows goes through all of them before the next one; of
it only the two results of the first products are kept, half of what autograd keeps, and the backward pass
computes the activation again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    """One product with all weights. Backward joins them anew: to keep them joined would take a copy."""

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


BLOCK_NUMBERS = 2**20  # activations a block, 4 MiB in fp32
FEWEST_ROWS = 512  # a block: with fewer, packing the weights anew for each outweighs the caches


def rows_a_block(rows: int, width: int) -> int:
    """Rows of equal blocks whose activations are `width` wide; all of them where one block is enough."""
    most = max(FEWEST_ROWS, BLOCK_NUMBERS // width)
    return max(1, math.ceil(rows / max(1, math.ceil(rows / most))))


def gated_mlp(
    x: Tensor,  # [..., D]
    gate: Tensor,  # [I, D]
    up: Tensor,  # [I, D]
    down: Tensor,  # [D, I]
) -> Tensor:  # [..., D]
    """(silu(x gate^T) * (x up^T)) down^T, SwiGLU (Shazeer, arXiv 2002.05202)."""
    rows = x.reshape(-1, x.shape[-1])
    size, keep = rows_a_block(len(rows), len(gate)), torch.is_grad_enabled()
    return _GatedMlp.apply(rows, gate, up, down, size, keep).view(x.shape)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, size: int, keep: bool) -> Tensor:
        """keep: for a backward pass; else a block's activations are written over by the next one's."""
        gated, upped = (x.new_empty(len(x) if keep else size, len(gate)) for _ in range(2))
        out, spare = torch.empty_like(x), x.new_empty(size, len(gate))
        for block in _blocks(len(x), size):
            place = block if keep else slice(0, block.stop - block.start)
            g, u, activation = gated[place], upped[place], spare[: block.stop - block.start]
            torch.mm(x[block], gate.T, out=g)
            torch.mm(x[block], up.T, out=u)
            torch.mm(torch.ops.aten.silu.out(g, out=activation).mul_(u), down.T, out=out[block])
        ctx.save_for_backward(x, gate, up, down, gated, upped)
        ctx.size = size
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, gate, up, down, gated, upped = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        needs = ctx.needs_input_grad
        grad_x, grad_gate, grad_up, grad_down = (
            torch.empty_like(one) if needed else None
            for one, needed in zip((x, gate, up, down), needs[:4], strict=True)
        )
        spares = [x.new_empty(ctx.size, len(gate)) for _ in range(3)]
        for block in _blocks(len(x), ctx.size):
            # The first product of a weight is its gradient itself; the others are added to it.
            beta = float(block.start > 0)
            g, u, incoming = gated[block], upped[block], grad[block]
            silu, d_gated, d_upped = (spare[: len(g)] for spare in spares)
            torch.ops.aten.silu.out(g, out=silu)
            if grad_down is not None:
                grad_down.addmm_(incoming.T, torch.mul(silu, u, out=d_upped), beta=beta)
            torch.mm(incoming, down, out=d_gated)
            torch.mul(d_gated, silu, out=d_upped)
            torch.ops.aten.silu_backward.grad_input(d_gated.mul_(u), g, grad_input=d_gated)
            if grad_x is not None:
                torch.mm(d_gated, gate, out=grad_x[block]).addmm_(d_upped, up)
            if grad_gate is not None:
                grad_gate.addmm_(d_gated.T, x[block], beta=beta)
            if grad_up is not None:
                grad_up.addmm_(d_upped.T, x[block], beta=beta)
        if not len(x):
            for one in (grad_gate, grad_up, grad_down):
                if one is not None:
                    one.zero_()
        return grad_x, grad_gate, grad_up, grad_down, None, None


def _blocks(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
