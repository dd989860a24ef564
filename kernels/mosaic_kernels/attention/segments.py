"""Tree attention on CPU as a few calls of PyTorch's fused kernel, merged exactly.

A query's visible keys are split among calls; each returns its part's output and logsumexp, and parts
merge as o = sum_i exp(l_i - l) o_i with l = logsumexp_i(l_i). For the backward pass the fused kernel is
given the merged output and logsumexp with each part's keys: then its probabilities are those of the whole
softmax, and the parts' gradients add up exactly to the whole gradient (the identity behind ring attention,
Liu et al., arXiv 2310.01889). No probabilities are kept between the passes.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mosaic_kernels.attention.plan import Plan
from mosaic_kernels.dispatch import result_dtype

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def segments_tree_attention(
    q: torch.Tensor,  # [Uq, Hq, D] on CPU
    k: torch.Tensor,  # [U, Hkv, D]
    v: torch.Tensor,  # [U, Hkv, D]
    plan: Plan,  # of the forest and the queries
    *,
    scale: float,
) -> torch.Tensor:  # [Uq, Hq, D]
    """In fp32, or fp64 for fp64 input; cast back to q's dtype. Keys and values are never repeated in memory
    for the query heads that share them, but for the few that are gathered.
    """
    dtype = result_dtype(q)
    queries, keys, values = (x.to(dtype) for x in (q, k, v))
    return _SegmentAttention.apply(queries, keys, values, plan, scale).to(q.dtype)


class _SegmentAttention(torch.autograd.Function):
    """Inside, H = Hkv heads of keys serve G = Hq / Hkv query heads each."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [Uq, Hq, D]
        k: torch.Tensor,  # [U, H, D]
        v: torch.Tensor,  # [U, H, D]
        plan: Plan,
        scale: float,
    ) -> torch.Tensor:
        q, k, v = (_dense_rows(x) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(k.shape[1], group, q.shape[0], dtype=q.dtype)
        queries, outs = (_heads_first(x, group) for x in (q, out))
        keys, values = (_shared(x, group) for x in (k, v))
        # Squares, stacks and buckets set each row; rectangles and contexts merge into it.
        for one in plan.squares:
            outs[:, :, one.rows], lse[:, :, one.rows] = _forward(
                queries[:, :, one.rows], keys[:, :, one.keys], values[:, :, one.keys], 0.0, True, scale=scale
            )
        for stack in plan.stacks:
            part, part_lse = _forward(
                _stacked(q, stack.rows, stack.squares), _stacked(k, stack.keys, stack.squares, group),
                _stacked(v, stack.keys, stack.squares, group), 0.0, True, scale=scale,
            )  # fmt: skip
            _set_rows(out, lse, part, part_lse, stack.rows, stack.real)
        for index, bucket in enumerate(plan.buckets):
            part, part_lse = _forward(
                _stacked(q, bucket.queries, bucket.blocks), _stacked(k, bucket.keys, bucket.blocks, group),
                _stacked(v, bucket.keys, bucket.blocks, group),
                attn_mask=plan.bias(index, q.dtype), scale=scale,
            )  # fmt: skip
            _set_rows(out, lse, part, part_lse, bucket.queries, None)
        for one in plan.rectangles:
            part = _forward(
                queries[:, :, one.rows], keys[:, :, one.keys], values[:, :, one.keys], scale=scale
            )
            _merge(outs[:, :, one.rows], lse[:, :, one.rows], *part)
        for context in plan.contexts:
            part = _forward(
                queries[:, :, context.rows], _shared(k[context.keys], group),
                _shared(v[context.keys], group), scale=scale,
            )  # fmt: skip
            _merge(outs[:, :, context.rows], lse[:, :, context.rows], *part)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, _dense_rows(grad_outputs[0])  # [Uq, Hq, D]
        group = q.shape[1] // k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grads, queries, outs, dqs = (_heads_first(x, group) for x in (grad, q, out, dq))
        keys, values = (_shared(x, group) for x in (k, v))

        def piece(rows: slice, its_keys: torch.Tensor, its_values: torch.Tensor, causal: bool) -> Gradients:
            return _backward(
                grads[:, :, rows], queries[:, :, rows], its_keys, its_values,
                outs[:, :, rows], lse[:, :, rows].contiguous(), 0.0, causal, scale=scale,
            )  # fmt: skip

        for one in plan.squares:
            parts = piece(one.rows, keys[:, :, one.keys], values[:, :, one.keys], True)
            dqs[:, :, one.rows] = parts[0]
            dk[one.keys] += _over_group(parts[1])
            dv[one.keys] += _over_group(parts[2])
        for stack in plan.stacks:
            rows, count = stack.rows, stack.squares
            incoming = grad.index_select(0, rows)
            if stack.real is not None:  # padding takes no part
                incoming = torch.zeros_like(incoming).index_copy_(0, stack.real, incoming[stack.real])
            parts = _backward(
                _split(incoming, count), _stacked(q, rows, count), _stacked(k, stack.keys, count, group),
                _stacked(v, stack.keys, count, group), _stacked(out, rows, count),
                _stacked_lse(lse, rows, count), 0.0, True, scale=scale,
            )  # fmt: skip
            _set(dq, rows, _unstacked(parts[0]), stack.real)
            dk.index_add_(0, stack.keys, _unstacked(parts[1], group))
            dv.index_add_(0, stack.keys, _unstacked(parts[2], group))
        for index, bucket in enumerate(plan.buckets):
            rows, columns, count = bucket.queries, bucket.keys, bucket.blocks
            parts = _backward(
                _stacked(grad, rows, count), _stacked(q, rows, count), _stacked(k, columns, count, group),
                _stacked(v, columns, count, group), _stacked(out, rows, count),
                _stacked_lse(lse, rows, count), 0.0, False, attn_mask=plan.bias(index, q.dtype), scale=scale,
            )  # fmt: skip
            dq.index_copy_(0, rows, _unstacked(parts[0]))
            dk.index_add_(0, columns, _unstacked(parts[1], group))
            dv.index_add_(0, columns, _unstacked(parts[2], group))
        for one in plan.rectangles:
            parts = piece(one.rows, keys[:, :, one.keys], values[:, :, one.keys], False)
            dqs[:, :, one.rows] += parts[0]
            dk[one.keys] += _over_group(parts[1])
            dv[one.keys] += _over_group(parts[2])
        for context in plan.contexts:
            above_k, above_v = (_shared(x[context.keys], group) for x in (k, v))
            parts = piece(context.rows, above_k, above_v, False)
            dqs[:, :, context.rows] += parts[0]
            dk.index_add_(0, context.keys, _over_group(parts[1]))
            dv.index_add_(0, context.keys, _over_group(parts[2]))
        needs = ctx.needs_input_grad
        return (dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None, None, None)


def _merge(
    out: torch.Tensor,  # [H, G, L, D] merged so far, updated in place
    lse: torch.Tensor,  # [H, G, L]
    part: torch.Tensor,  # [H, G, L, D]
    part_lse: torch.Tensor,  # [H, G, L]
) -> None:
    share = torch.sigmoid(part_lse - lse)  # = exp(part_lse) / (exp(part_lse) + exp(lse))
    out.lerp_(part, share.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _set_rows(
    out: torch.Tensor,  # [Uq, Hq, D]
    lse: torch.Tensor,  # [H, G, Uq]
    part: torch.Tensor,  # [N, Hq, L, D]
    part_lse: torch.Tensor,  # [N, Hq, L]
    rows: torch.Tensor,  # [N * L]
    real: torch.Tensor | None,  # [R] among N * L
) -> None:
    _set(out, rows, _unstacked(part), real)
    flat = part_lse.transpose(0, 1).reshape(part.shape[1], -1)
    if real is not None:
        rows, flat = rows[real], flat[:, real]
    lse.flatten(0, 1).index_copy_(1, rows, flat)


def _set(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None) -> None:
    """target[rows] = values, without the padding."""
    if real is not None:
        rows, values = rows[real], values[real]
    target.index_copy_(0, rows, values)


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The fused kernel wants the last dimension contiguous; any other stride will do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_first(x: torch.Tensor, group: int) -> torch.Tensor:
    """[U, H * G, D] -> [H, G, U, D], a view."""
    return x.unflatten(1, (-1, group)).permute(1, 2, 0, 3)


def _shared(x: torch.Tensor, group: int) -> torch.Tensor:
    """[U, H, D] -> [H, G, U, D], a view in which the group's heads are the same memory."""
    return x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _over_group(x: torch.Tensor) -> torch.Tensor:
    """Gradients [H, G, U, D] -> [U, H, D], summed over the heads that share a key."""
    return (x.sum(1) if x.shape[1] > 1 else x[:, 0]).transpose(0, 1)


def _stacked(x: torch.Tensor, nodes: torch.Tensor, blocks: int, group: int = 1) -> torch.Tensor:
    """Rows of [U, H, D] -> [N, H * G, rows of a block, D], each head repeated for its group."""
    return _split(x.index_select(0, nodes), blocks, group)


def _split(x: torch.Tensor, blocks: int, group: int = 1) -> torch.Tensor:
    """[N * rows of a block, H, D] -> [N, H * G, rows of a block, D]."""
    if group > 1:
        x = x.repeat_interleave(group, dim=1)
    return x.view(blocks, -1, x.shape[1], x.shape[2]).transpose(1, 2)


def _unstacked(x: torch.Tensor, group: int = 1) -> torch.Tensor:
    """[N, H * G, rows of a block, D] -> [N * rows, H, D], summed over the group."""
    if group > 1:
        x = x.unflatten(1, (-1, group)).sum(2)
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _stacked_lse(lse: torch.Tensor, rows: torch.Tensor, blocks: int) -> torch.Tensor:
    """[H, G, Uq] -> [N, H * G, rows of a block]."""
    picked = lse.flatten(0, 1).index_select(1, rows)
    return picked.view(picked.shape[0], blocks, -1).transpose(0, 1).contiguous()
