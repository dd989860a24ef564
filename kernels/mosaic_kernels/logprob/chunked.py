"""Log-probs and entropies a chunk of rows at a time: large logits are never in memory as a whole.

The forward pass keeps one logsumexp (and entropy) a row, and the probabilities of the first chunks up to a
fixed amount; the backward pass computes those of the other chunks again, and turns a chunk's probabilities
into the gradient of its logits (Cut Cross-Entropy, Wijmans et al., arXiv 2411.09009, without its gradient
filter, which is not exact). With p = softmax(z) over a row, incoming gradients g_e of its targets and h of
its entropy H:

    dL/dz = sum_e g_e onehot(target_e) - p (sum_e g_e) - h p (log p + H)

A softcap c bends a row's logits a to c tanh(a / c) before the temperature divides them into z; its derivative
1 - tanh^2 is read off the bent logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mosaic_kernels.dispatch import result_dtype
from mosaic_kernels.fixed_order import add_up

BUDGET_BYTES = 90 * 2**20
"""What logits and probabilities may take at a time, beside numbers a row and the gradients: 96 MiB in all."""
CHUNK_LOGITS = 2**22  # logits a chunk, 16 MiB in fp32
CHUNK_ROWS = 128  # but, where they fit, no fewer rows: below, reading the weight outweighs the arithmetic


@dataclass(frozen=True, eq=False)
class _Chunk:
    rows: slice  # of hidden
    edges: slice  # of the edges, sorted by row
    row_in_chunk: torch.Tensor  # [edges] int64
    targets: torch.Tensor  # [edges] int64


def chunked_linear_logprob(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [E] int64
    rows: torch.Tensor,  # [E] int64
    bias: torch.Tensor | None,  # [V]
    temperature: float,
    return_entropy: bool,
    softcap: float | None = None,
    *,
    chunk_rows: int | None = None,
    kept_logits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # [E], [N] or None
    """In fp32 or, for fp64 input, fp64. Without entropy, rows that no target needs are not computed.

    chunk_rows, kept_logits: rows a chunk, and probabilities that the forward pass keeps for the backward
        pass; None takes what `memory_plan` allows.
    """
    dtype = result_dtype(hidden, weight)
    if not return_entropy:
        used, rows = torch.unique(rows, return_inverse=True)
        if len(used) < len(hidden):
            hidden = hidden.index_select(0, used)
    planned = memory_plan(len(hidden), len(weight), dtype.itemsize, softcap=softcap is not None)
    order, chunks = _chunks(targets, rows, len(hidden), chunk_rows or planned[0])
    kept_logits = planned[1] if kept_logits is None else kept_logits
    if not torch.is_grad_enabled():
        kept_logits = 0
    logprobs, entropy = _ChunkedLogprob.apply(
        hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype),
        order, chunks, 1.0 / temperature, return_entropy, softcap, kept_logits,
    )  # fmt: skip
    return logprobs, entropy


def memory_plan(rows: int, vocab: int, itemsize: int, *, softcap: bool = False) -> tuple[int, int]:
    """Rows a chunk, and how many probabilities the forward pass may keep, within BUDGET_BYTES.

    A chunk in work has two buffers, with a softcap three. A vocabulary of which they cannot hold one row is
    taken a row at a time all the same.
    """
    buffers, numbers = (3 if softcap else 2), BUDGET_BYTES // itemsize
    most = max(1, numbers // buffers // max(vocab, 1))
    size = min(max(CHUNK_ROWS, CHUNK_LOGITS // max(vocab, 1)), most)
    return size, numbers - buffers * min(size, max(rows, 1)) * vocab


def _chunks(
    targets: torch.Tensor, rows: torch.Tensor, num_rows: int, size: int
) -> tuple[torch.Tensor, list[_Chunk]]:
    """The order that sorts edges by row [E], and the chunks of the sorted edges."""
    sorted_rows, order = torch.sort(rows, stable=True)
    sorted_targets = targets[order]
    starts = torch.arange(0, num_rows, size, device=rows.device)
    bounds = [*torch.searchsorted(sorted_rows, starts).tolist(), len(rows)]
    chunks = []
    for index, start in enumerate(range(0, num_rows, size)):
        edges = slice(bounds[index], bounds[index + 1])
        chunks.append(
            _Chunk(
                slice(start, min(start + size, num_rows)),
                edges,
                sorted_rows[edges] - start,
                sorted_targets[edges],
            )
        )
    return order, chunks


def _rows(chunks: list[_Chunk]) -> int:
    """Of the largest chunk."""
    return max((chunk.rows.stop - chunk.rows.start for chunk in chunks), default=0)


def _logits(
    hidden: torch.Tensor,  # [C, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    inverse_temperature: float,
    softcap: float | None,
    spare: torch.Tensor,  # [C or more, V], written to
) -> torch.Tensor:  # [C, V]
    out = spare[: len(hidden)]
    scale = inverse_temperature if softcap is None else 1 / softcap
    if bias is None:
        torch.mm(hidden if scale == 1.0 else hidden * scale, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, beta=scale, alpha=scale, out=out)
    return out if softcap is None else out.tanh_().mul_(softcap * inverse_temperature)


class _ChunkedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [N, D]
        weight: torch.Tensor,  # [V, D]
        bias: torch.Tensor | None,  # [V]
        order: torch.Tensor,  # [E] sorts the edges by row
        chunks: list[_Chunk],
        inverse_temperature: float,
        return_entropy: bool,
        softcap: float | None,
        kept_logits: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        num_rows = len(hidden)
        spare = hidden.new_empty(_rows(chunks), len(weight))
        other = None  # a second one, once a chunk's probabilities are not kept
        sorted_logprobs = hidden.new_empty(len(order))
        lse = hidden.new_empty(num_rows)
        entropy = hidden.new_empty(num_rows) if return_entropy else None
        kept: list[torch.Tensor] = []
        for chunk in chunks:
            logits = _logits(hidden[chunk.rows], weight, bias, inverse_temperature, softcap, spare)
            # A softcap's derivative is read off the logits, which are then computed again.
            keep = softcap is None and kept_logits >= logits.numel()
            kept_logits = kept_logits - logits.numel() if keep else 0  # the kept ones are the first chunks
            if keep:
                probabilities = torch.empty_like(logits)
                kept.append(probabilities)
            else:
                other = torch.empty_like(spare) if other is None else other
                probabilities = other[: len(logits)]
            torch.softmax(logits, dim=1, out=probabilities)
            largest = logits.amax(dim=1)
            at_target = logits[chunk.row_in_chunk, chunk.targets] - largest[chunk.row_in_chunk]
            log_sum = probabilities.amax(1).log_().neg_()  # the largest one is 1 / sum
            if entropy is not None:
                # In shifted logits H = log sum - sum p z keeps its digits when logits are large.
                # A logit of -inf has probability 0 and adds 0.
                shifted = logits.sub_(largest[:, None])
                expected = shifted.clamp_(min=torch.finfo(shifted.dtype).min).mul_(probabilities).sum(1)
                entropy[chunk.rows] = log_sum - expected
            sorted_logprobs[chunk.edges] = at_target - log_sum[chunk.row_in_chunk]
            lse[chunk.rows] = log_sum + largest
        logprobs = torch.empty_like(sorted_logprobs)
        logprobs[order] = sorted_logprobs
        ctx.save_for_backward(hidden, weight, bias, lse, entropy, *kept)
        ctx.order, ctx.chunks, ctx.inverse_temperature = order, chunks, inverse_temperature
        ctx.softcap = softcap
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(
        ctx: Any,
        *grad_outputs: Any,  # [E] and [N] or None
    ) -> tuple[torch.Tensor | None, ...]:
        grad_logprobs, grad_entropy = grad_outputs
        hidden, weight, bias, lse, entropy, *kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        if grad_weight is not None and not ctx.chunks:
            grad_weight.zero_()
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        grad_targets = None if grad_logprobs is None else grad_logprobs[ctx.order]
        alpha, softcap = ctx.inverse_temperature, ctx.softcap
        spare = hidden.new_empty(_rows(ctx.chunks), len(weight))
        other = None  # a second one, for what is made of probabilities that are in the first
        for index, chunk in enumerate(ctx.chunks):
            slope, out = None, spare
            if grad_entropy is not None and index >= len(kept):
                out = other = torch.empty_like(spare) if other is None else other
            if index < len(kept):
                probabilities = kept[index]  # not written to: it may be asked for again (retain_graph)
            else:
                logits = _logits(hidden[chunk.rows], weight, bias, alpha, softcap, spare)
                if softcap is not None:
                    slope = torch.div(logits, softcap * alpha).square_().neg_().add_(1)
                probabilities = logits.sub_(lse[chunk.rows, None]).exp_()
            grad_logits = _grad_logits(
                probabilities,
                None if entropy is None else entropy[chunk.rows],
                None if grad_entropy is None else grad_entropy[chunk.rows],
                None if grad_targets is None else grad_targets[chunk.edges],
                chunk,
                out[: len(probabilities)],
            )
            if slope is not None:
                grad_logits = grad_logits.mul_(slope)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk.rows]).mul_(alpha)
            if grad_weight is not None:
                # The first product is the gradient itself: a large weight's zeros would be written and read.
                grad_weight.addmm_(grad_logits.T, hidden[chunk.rows], alpha=alpha, beta=float(index > 0))
            if grad_bias is not None:
                grad_bias.add_(grad_logits.sum(0), alpha=alpha)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _grad_logits(
    probabilities: torch.Tensor,  # [C, V]
    entropy: torch.Tensor | None,  # [C]
    grad_entropy: torch.Tensor | None,  # [C]
    grad_targets: torch.Tensor | None,  # [edges]
    chunk: _Chunk,
    out: torch.Tensor,  # [C, V], where the result goes: the probabilities' own place only without entropy
) -> torch.Tensor:  # [C, V]
    if grad_targets is None:
        of_row = probabilities.new_zeros(len(probabilities))
    else:  # the sum of each row's target gradients
        of_row = add_up(grad_targets, chunk.row_in_chunk, len(probabilities))
    if entropy is None or grad_entropy is None:
        grad = torch.mul(probabilities, -of_row[:, None], out=out)
    else:
        # What is too small for a number has probability 0, whatever its logarithm.
        grad = torch.clamp(probabilities, min=torch.finfo(probabilities.dtype).tiny, out=out)
        grad = grad.log_().add_(entropy[:, None])
        grad = grad.mul_(-grad_entropy[:, None]).sub_(of_row[:, None]).mul_(probabilities)
    if grad_targets is not None:
        grad.index_put_((chunk.row_in_chunk, chunk.targets), grad_targets, accumulate=True)
    return grad
