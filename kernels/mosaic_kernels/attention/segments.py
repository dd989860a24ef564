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
    """In fp32, or fp64 for fp64 input; cast back to q's dtype."""
    dtype, group = result_dtype(q), q.shape[1] // k.shape[1]
    queries, keys, values = (x.to(dtype) for x in (q, k, v))
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    return _SegmentAttention.apply(queries, keys, values, plan, scale).to(q.dtype)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [Uq, H, D]
        k: torch.Tensor,  # [U, H, D]
        v: torch.Tensor,  # [U, H, D]
        plan: Plan,
        scale: float,
    ) -> torch.Tensor:
        q, k, v = (_dense_rows(x) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(1, q.shape[1], q.shape[0], dtype=q.dtype)
        queries, keys, values, outs = (_heads_first(x) for x in (q, k, v, out))
        # A node's own square or block comes first: it sets the row, and the other parts merge into it.
        for trunk in plan.trunks:
            own = trunk.own
            if own.start == own.stop:
                continue
            outs[:, :, own], lse[:, :, own] = _forward(
                queries[:, :, own], keys[:, :, trunk.keys], values[:, :, trunk.keys], 0.0, True, scale=scale
            )
            if trunk.context is not None:
                above = [_heads_first(x[trunk.context]) for x in (k, v)]
                _merge(outs[:, :, own], lse[:, :, own], *_forward(queries[:, :, own], *above, scale=scale))
        for index, bucket in enumerate(plan.buckets):
            part, part_lse = _forward(
                _stacked(q, bucket.queries, bucket.blocks),
                _stacked(k, bucket.keys, bucket.blocks),
                _stacked(v, bucket.keys, bucket.blocks),
                attn_mask=plan.bias(index, q.dtype),
                scale=scale,
            )
            out.index_copy_(0, bucket.queries, _unstacked(part))
            lse.index_copy_(2, bucket.queries, part_lse.transpose(0, 1).reshape(1, q.shape[1], -1))
        for trunk in plan.trunks:
            below = trunk.below
            if below.start < below.stop:
                part = _forward(
                    queries[:, :, below], keys[:, :, trunk.keys], values[:, :, trunk.keys], scale=scale
                )
                _merge(outs[:, :, below], lse[:, :, below], *part)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, _dense_rows(grad_outputs[0])  # [U, H, D]
        # Each row is set by its square or block. Each key is set by its square where there is nothing else.
        dq = torch.empty_like(q)
        squares = all(trunk.own.start < trunk.own.stop for trunk in plan.trunks) and not plan.buckets
        dk, dv = (torch.empty_like(x) if squares and plan.trunks else torch.zeros_like(x) for x in (k, v))
        grads, queries, keys, values, outs = (_heads_first(x) for x in (grad, q, k, v, out))
        dqs, dks, dvs = (_heads_first(x) for x in (dq, dk, dv))

        def rectangle(rows: slice, columns: slice, causal: bool) -> tuple[torch.Tensor, ...]:
            return _backward(
                grads[:, :, rows], queries[:, :, rows], keys[:, :, columns], values[:, :, columns],
                outs[:, :, rows], lse[:, :, rows].contiguous(), 0.0, causal, scale=scale,
            )  # fmt: skip

        for trunk in plan.trunks:
            own, columns = trunk.own, trunk.keys
            if own.start < own.stop:
                dqs[:, :, own], dks[:, :, columns], dvs[:, :, columns] = rectangle(own, columns, True)
        for index, bucket in enumerate(plan.buckets):
            rows, columns, blocks = bucket.queries, bucket.keys, bucket.blocks
            part_lse = lse[0].index_select(1, rows).view(q.shape[1], blocks, -1).transpose(0, 1).contiguous()
            parts = _backward(
                _stacked(grad, rows, blocks), _stacked(q, rows, blocks), _stacked(k, columns, blocks),
                _stacked(v, columns, blocks), _stacked(out, rows, blocks), part_lse, 0.0, False,
                attn_mask=plan.bias(index, q.dtype), scale=scale,
            )  # fmt: skip
            dq.index_copy_(0, rows, _unstacked(parts[0]))
            dk.index_add_(0, columns, _unstacked(parts[1]))
            dv.index_add_(0, columns, _unstacked(parts[2]))
        for trunk in plan.trunks:
            own, below = trunk.own, trunk.below
            if below.start < below.stop:
                parts = rectangle(below, trunk.keys, False)
                dqs[:, :, below] += parts[0]
                dks[:, :, trunk.keys] += parts[1]
                dvs[:, :, trunk.keys] += parts[2]
            if trunk.context is not None and own.start < own.stop:
                parts = _backward(
                    grads[:, :, own], queries[:, :, own], _heads_first(k[trunk.context]),
                    _heads_first(v[trunk.context]), outs[:, :, own], lse[:, :, own].contiguous(),
                    0.0, False, scale=scale,
                )  # fmt: skip
                dqs[:, :, own] += parts[0]
                dk.index_add_(0, trunk.context, _unstacked(parts[1]))
                dv.index_add_(0, trunk.context, _unstacked(parts[2]))
        needs = ctx.needs_input_grad
        return (dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None, None, None)


def _merge(
    out: torch.Tensor,  # [1, H, L, D] merged so far, updated in place
    lse: torch.Tensor,  # [1, H, L]
    part: torch.Tensor,  # [1, H, L, D]
    part_lse: torch.Tensor,  # [1, H, L]
) -> None:
    share = torch.sigmoid(part_lse - lse)  # = exp(part_lse) / (exp(part_lse) + exp(lse))
    out.lerp_(part, share.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """The fused kernel wants the last dimension contiguous; any other stride will do."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[U, H, D] -> [1, H, U, D], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _stacked(x: torch.Tensor, nodes: torch.Tensor, blocks: int) -> torch.Tensor:
    """Rows of [U, H, D] -> [N, H, rows of a block, D]."""
    return x.index_select(0, nodes).view(blocks, -1, x.shape[1], x.shape[2]).transpose(1, 2)


def _unstacked(x: torch.Tensor) -> torch.Tensor:
    """[N, H, rows of a block, D] -> [N * rows, H, D]."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])
