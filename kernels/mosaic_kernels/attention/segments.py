"""Tree attention on CPU as a few calls of PyTorch's fused kernel, merged exactly.

A query's visible keys are split among calls; each returns its part's output and logsumexp, and parts
merge as o = sum_i exp(l_i - l) o_i with l = logsumexp_i(l_i). For the backward pass the fused kernel is
given the merged output and logsumexp with each part's keys: then its probabilities are those of the whole
softmax, and the parts' gradients add up exactly to the whole gradient (the identity behind ring attention,
Liu et al., arXiv 2310.01889). No probabilities are kept between the passes. A sink is merged last, as a key
whose value is 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mosaic_kernels.attention.capped import capped_backward, capped_forward
from mosaic_kernels.attention.plan_parts import Plan, Rows
from mosaic_kernels.dispatch import result_dtype

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def segments_tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D] on CPU
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, V]
    plan: Plan,  # of the forest and the queries
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> torch.Tensor:  # [Uq, Hq, V]
    """In fp32, or fp64 for fp64 input; cast back to q's dtype. The fused kernel itself reads a key head for
    all query heads that share it, and adds up their gradients. It knows one head size: zeros fill up what
    is smaller.
    """
    dtype, size = result_dtype(q), max(q.shape[2], v.shape[2])
    queries, keys, values = (_padded(x.to(dtype), size) for x in (q, k, v))
    sinks = None if sinks is None else sinks.to(dtype)
    out = _SegmentAttention.apply(queries, keys, values, sinks, plan, scale, softcap)
    return out[..., : v.shape[2]].to(q.dtype)


def _padded(x: torch.Tensor, size: int) -> torch.Tensor:
    return x if x.shape[2] == size else pad(x, (0, size - x.shape[2]))


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of the fused kernel: N blocks of L queries, each with K keys of its own."""

    rows: Rows  # [N * L]
    keys: Rows  # [N * K]
    blocks: int  # N
    causal: bool = False
    bias: torch.Tensor | None = None  # [N, 1, L, K]
    real: torch.Tensor | None = None  # the rows that are no padding, among N * L; None: all
    merged: bool = False  # into rows that other calls have set


def _calls(plan: Plan, dtype: torch.dtype) -> Iterator[_Call]:
    """Squares, stacks and buckets set each row; rectangles and contexts are merged into it."""
    for square in plan.squares:
        yield _Call(square.rows, square.keys, 1, causal=True)
    for stack in plan.stacks:
        yield _Call(stack.rows, stack.keys, stack.squares, causal=True, real=stack.real)
    for index, bucket in enumerate(plan.buckets):
        yield _Call(bucket.queries, bucket.keys, bucket.blocks, bias=plan.bias(index, dtype))
    for one in (*plan.rectangles, *plan.contexts):
        yield _Call(one.rows, one.keys, 1, merged=True)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [Uq, Hq, D]
        k: torch.Tensor,  # [U, Hkv, D]
        v: torch.Tensor,  # [U, Hkv, D]
        sinks: torch.Tensor | None,  # [Hq]
        plan: Plan,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        q, k, v = (_dense_rows(x) for x in (q, k, v))
        out: torch.Tensor | None = None  # [Uq, Hq, D]
        lse: torch.Tensor | None = None  # [Uq, Hq]
        for call in _calls(plan, q.dtype):
            part, part_lse = _attend(
                call, _blocks(q, call.rows, call), _blocks(k, call.keys, call), _blocks(v, call.keys, call),
                scale, softcap,
            )  # fmt: skip
            part, part_lse = _rows(part), _rows(part_lse)
            if call.merged:
                assert out is not None
                assert lse is not None
                assert isinstance(call.rows, slice)
                _merge(out[call.rows], lse[call.rows], part, part_lse)
            else:
                out = _set(out, call, part, len(q))
                lse = _set(lse, call, part_lse, len(q))
        if out is None or lse is None:  # no queries
            out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        if sinks is not None:
            total = torch.logaddexp(lse, sinks)
            out, lse = out.mul_((lse - total).exp_().unsqueeze(-1)), total
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.scale, ctx.softcap = plan, scale, softcap
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grad = _dense_rows(grad_outputs[0])  # [Uq, Hq, D]
        dq: torch.Tensor | None = None
        dk: torch.Tensor | None = None
        dv: torch.Tensor | None = None
        for call in _calls(ctx.plan, q.dtype):
            incoming = _picked(grad, call.rows)
            if call.real is not None:  # padding takes no part
                incoming = torch.zeros_like(incoming).index_copy_(0, call.real, incoming[call.real])
            parts = _attend_backward(
                call, _split(incoming, call), _blocks(q, call.rows, call), _blocks(k, call.keys, call),
                _blocks(v, call.keys, call), _blocks(out, call.rows, call), _blocks(lse, call.rows, call),
                ctx.scale, ctx.softcap,
            )  # fmt: skip
            part_q, part_k, part_v = (_rows(part) for part in parts)
            dq = _add(dq, call.rows, part_q, len(q)) if call.merged else _set(dq, call, part_q, len(q))
            dk = _add(dk, call.keys, part_k, len(k))
            dv = _add(dv, call.keys, part_v, len(v))
        if dq is None or dk is None or dv is None:
            dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_sinks = None
        if sinks is not None:
            d_sinks = -((sinks - lse).exp_() * (out * grad).sum(-1)).sum(0)
        needs = ctx.needs_input_grad
        gradients = (
            x if needed else None for x, needed in zip((dq, dk, dv, d_sinks), needs[:4], strict=True)
        )
        return *gradients, None, None, None


def _attend(
    call: _Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp of a part."""
    if softcap is not None:
        return capped_forward(q, k, v, causal=call.causal, scale=scale, softcap=softcap, bias=call.bias)
    return _forward(q, k, v, 0.0, call.causal, scale=scale, **_mask(call))


def _attend_backward(
    call: _Call,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,  # merged, as lse
    lse: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from a part."""
    if softcap is not None:
        return capped_backward(
            grad, q, k, v, out, lse, causal=call.causal, scale=scale, softcap=softcap, bias=call.bias
        )
    return _backward(grad, q, k, v, out, lse, 0.0, call.causal, scale=scale, **_mask(call))


def _merge(
    out: torch.Tensor,  # [L, H, D] merged so far, updated in place
    lse: torch.Tensor,  # [L, H]
    part: torch.Tensor,  # [L, H, D]
    part_lse: torch.Tensor,  # [L, H]
) -> None:
    share = torch.sigmoid(part_lse - lse)  # = exp(part_lse) / (exp(part_lse) + exp(lse))
    out.lerp_(part, share.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _mask(call: _Call) -> dict[str, torch.Tensor]:
    return {} if call.bias is None else {"attn_mask": call.bias}


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The fused kernel wants the last dimension contiguous; any other stride will do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _picked(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """x[rows]: a view of consecutive ones."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _blocks(x: torch.Tensor, rows: Rows, call: _Call) -> torch.Tensor:
    """Rows of [U, H, ...] -> [N, H, rows of a block, ...]."""
    return _split(_picked(x, rows), call)


def _split(x: torch.Tensor, call: _Call) -> torch.Tensor:
    """[N * rows of a block, H, ...] -> [N, H, rows of a block, ...], a view."""
    return x.unflatten(0, (call.blocks, -1)).transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, H, rows of a block, ...] -> [N * rows, H, ...]; a view of what the fused kernel gives."""
    return x.transpose(1, 2).flatten(0, 1)


def _set(target: torch.Tensor | None, call: _Call, values: torch.Tensor, size: int) -> torch.Tensor:
    """target[rows] = values, without the padding. A target of `size` rows is made where there is none yet."""
    rows = call.rows
    if _is_all(rows, size):
        return values
    if target is None:
        target = values.new_empty(size, *values.shape[1:])
    if isinstance(rows, slice):
        target[rows] = values
        return target
    if call.real is not None:
        rows, values = rows[call.real], values[call.real]
    return target.index_copy_(0, rows, values)


def _add(target: torch.Tensor | None, rows: Rows, values: torch.Tensor, size: int) -> torch.Tensor:
    """target[rows] += values, in a fixed order where a row comes more than once; None is all zeros."""
    if target is None:
        if _is_all(rows, size):
            return values
        target = values.new_zeros(size, *values.shape[1:])
    if isinstance(rows, slice):
        target[rows] += values
        return target
    return target.index_add_(0, rows, values)


def _is_all(rows: Rows, size: int) -> bool:
    return isinstance(rows, slice) and rows.stop - rows.start == size
