"""linear_logprob by Triton kernels; its backward pass adds matrix products, a chunk of vocabulary each."""

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mosaic_kernels.attention.tiles import architecture_of, tf32_allowed
from mosaic_kernels.dispatch import emulated, launch
from mosaic_kernels.gather_sum import gather_sum_kernel
from mosaic_kernels.logprob import kernels
from mosaic_kernels.logprob.reference import edges_by_row, edges_by_tile, reference_linear_logprob
from mosaic_kernels.logprob.tiles import FEW_ROWS, Tile, Tiles, tiles_for, vocabulary_shares
from mosaic_kernels.selfcheck import Deviation, check_once, deviations_of

CHUNK_LOGITS = 2**27  # dL/dlogits in memory at a time: 256 MiB in 16 bits
BLOCK = 128  # rows of the kernels that only touch a number a row


def triton_linear_logprob(
    hidden: torch.Tensor,  # [N, D] bf16, fp16 or fp32
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [E] int64
    rows: torch.Tensor,  # [E] int64
    bias: torch.Tensor | None,  # [V]
    temperature: float,
    return_entropy: bool,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # [E] fp32, [N] fp32 or None
    """fp32 accumulation whatever the dtype; fp32 dots are IEEE unless torch allows TF32.

    Without entropy, rows that no target needs are not computed. ValueError if the tile table has no entry.
    """
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if not return_entropy:
        used, rows = torch.unique(rows, return_inverse=True)
        if len(used) < len(hidden):
            hidden = hidden.index_select(0, used)
    # By the rows that are left: the tile, what is checked, and how the vocabulary is shared must agree.
    num_rows, dim = hidden.shape
    tiles = tiles_for(architecture_of(hidden.device), dtype, num_rows)
    variant = Variant(
        dtype, _precision(dtype), dim, few_rows=num_rows <= FEW_ROWS, entropy=return_entropy,
        bias=bias is not None, softcap=softcap is not None,
    )  # fmt: skip
    check_once("linear_logprob", hidden.device, variant, deviations)
    return tiled_linear_logprob(
        hidden.to(dtype), weight.to(dtype), targets, rows, bias, temperature, return_entropy, softcap,
        tiles=tiles, splits=_splits(num_rows, tiles.forward, hidden.device),
    )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What compiles to different kernels."""

    dtype: torch.dtype
    precision: str
    dim: int  # of the hidden states, D
    few_rows: bool
    entropy: bool
    bias: bool
    softcap: bool


def tiled_linear_logprob(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D] in the same dtype
    targets: torch.Tensor,  # [E] int64
    rows: torch.Tensor,  # [E] int64
    bias: torch.Tensor | None,  # [V]
    temperature: float,
    return_entropy: bool,
    softcap: float | None,
    *,
    tiles: Tiles,
    splits: int = 1,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The kernels with given tiles, the vocabulary cut into `splits` shares in the forward pass."""
    return _TritonLogprob.apply(
        hidden.contiguous(), weight.contiguous(), None if bias is None else bias.float().contiguous(),
        targets, rows, 1.0 / temperature, return_entropy, softcap, tiles, splits, chunk_logits,
    )  # fmt: skip


class _TritonLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [N, D] contiguous
        weight: torch.Tensor,  # [V, D] contiguous
        bias: torch.Tensor | None,  # [V] fp32
        targets: torch.Tensor,  # [E] int64
        rows: torch.Tensor,  # [E] int64
        inverse_temperature: float,
        return_entropy: bool,
        softcap: float | None,
        tiles: Tiles,
        splits: int,
        chunk_logits: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        (num_rows, vocab), tile = (len(hidden), len(weight)), tiles.forward
        vocab_tiles = _cdiv(vocab, tile.vocab)
        tiles_per_split = _cdiv(vocab_tiles, min(splits, vocab_tiles))
        num_splits = _cdiv(vocab_tiles, tiles_per_split)

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=hidden.device)

        row_max, row_log_sum = empty(num_rows), empty(num_rows)
        # On an accelerator targets are not checked (that would wait for it): one outside [0, V) stays NaN.
        edge_logits = torch.full((len(rows),), torch.nan, dtype=torch.float32, device=hidden.device)
        entropy = empty(num_rows) if return_entropy else None
        if num_rows:
            highest, total = empty(num_splits, num_rows), empty(num_splits, num_rows)
            weighted = empty(num_splits, num_rows) if return_entropy else highest  # not written without
            listed = edges_by_tile(rows, targets, num_rows, vocab, tile.rows, tile.vocab)
            launch(
                kernels.forward_kernel, _cdiv(num_rows, tile.rows) * num_splits,
                hidden, weight, weight if bias is None else bias, rows.int(), targets.int(),
                listed.members, listed.starts, highest, total, weighted, edge_logits,
                num_rows, vocab, tiles_per_split, inverse_temperature, softcap or 1.0,
                **_constants(hidden, tile, bias, softcap, ENTROPY=return_entropy),
            )  # fmt: skip
            launch(
                kernels.merge_kernel, _cdiv(num_rows, BLOCK),
                highest, total, weighted, row_max, row_log_sum, row_max if entropy is None else entropy,
                num_rows, num_splits, BLOCK=BLOCK, ENTROPY=return_entropy,
            )  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, rows, targets, row_max, row_log_sum, entropy, edge_logits)
        ctx.inverse_temperature, ctx.softcap = inverse_temperature, softcap
        ctx.tile, ctx.chunk_logits = tiles.backward, chunk_logits
        ctx.set_materialize_grads(False)
        # Not edge_logits - logsumexp: of large logits, that would keep few digits.
        return (edge_logits - row_max[rows]) - row_log_sum[rows], entropy

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(
        ctx: Any,
        *grad_outputs: Any,  # [E] and [N] or None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, rows, targets, row_max, row_log_sum, entropy, edge_logits = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_edges, grad_entropy = (None if x is None else x.float().contiguous() for x in grad_outputs)
        (num_rows, vocab), tile = (len(hidden), len(weight)), ctx.tile
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        if num_rows == 0:
            return _as(grad_hidden, hidden), grad_weight, grad_bias, *[None] * 8

        grad_rows = torch.empty_like(row_max)
        if grad_edges is not None:
            by_row = edges_by_row(rows, num_rows)
            launch(
                gather_sum_kernel, _cdiv(num_rows, BLOCK),
                grad_edges, by_row.members, by_row.starts, grad_rows, num_rows, BLOCK=BLOCK,
            )  # fmt: skip
        by_tile = edges_by_tile(rows, targets, num_rows, vocab, tile.rows, tile.vocab)
        chunk_tiles = max(1, ctx.chunk_logits // (tile.vocab * num_rows))
        width = min(chunk_tiles, _cdiv(vocab, tile.vocab)) * tile.vocab
        grad_logits = hidden.new_empty(num_rows, width)
        for first in range(0, vocab, width):
            columns = min(width, vocab - first)
            launch(
                kernels.backward_kernel, _cdiv(num_rows, tile.rows) * _cdiv(columns, tile.vocab),
                hidden, weight, weight if bias is None else bias, rows.int(), targets.int(),
                by_tile.members, by_tile.starts, row_max, row_log_sum,
                row_max if entropy is None else entropy, edge_logits,
                row_max if grad_edges is None else grad_edges, grad_rows,
                row_max if grad_entropy is None else grad_entropy, grad_logits,
                num_rows, vocab, first, columns, width, ctx.inverse_temperature, ctx.softcap or 1.0,
                **_constants(
                    hidden, tile, bias, ctx.softcap,
                    EDGES=grad_edges is not None, ENTROPY=grad_entropy is not None,
                ),
            )  # fmt: skip
            chunk, part = grad_logits[:, :columns], slice(first, first + columns)
            if grad_hidden is not None:
                add_product(grad_hidden, chunk, weight[part])
            if grad_weight is not None:
                torch.mm(chunk.T, hidden, out=grad_weight[part])
            if grad_bias is not None:
                torch.sum(chunk, 0, dtype=torch.float32, out=grad_bias[part])
        return _as(grad_hidden, hidden), grad_weight, grad_bias, *[None] * 8


def _constants(
    hidden: torch.Tensor, tile: Tile, bias: torch.Tensor | None, softcap: float | None, **flags: bool
) -> dict[str, Any]:
    return {
        "D": hidden.shape[1],
        "BLOCK_ROWS": tile.rows,
        "BLOCK_VOCAB": tile.vocab,
        "BLOCK_DIM": tile.dim,
        "BIAS": bias is not None,
        "SOFTCAP": softcap is not None,
        "PRECISION": _precision(hidden.dtype),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **flags,
    }


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def _splits(num_rows: int, tile: Tile, device: torch.device) -> int:
    if emulated():
        return 2
    return vocabulary_shares(num_rows, tile, torch.cuda.get_device_properties(device).multi_processor_count)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:  # fp32 [N, D]
    """total += a @ b in fp32, inside the product: in 16 bits each chunk would be rounded."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif not a.is_cuda or emulated():
        total.addmm_(a.float(), b.float())
    elif _adds_in_fp32(a.device):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)


@functools.cache
def _adds_in_fp32(device: torch.device) -> bool:
    """Whether this PyTorch adds a product of 16-bit numbers to an fp32 matrix; tried, since some refuse."""
    x = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(x.float(), x, x, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def _as(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if grad is None else grad.to(like.dtype)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def deviations(device: torch.device, variant: Hashable) -> Mapping[str, Deviation]:
    """The self-check: results and gradients of a small problem with forks, against the reference in fp64.

    With entropy, the gradient of the log-probs alone is another kernel: it is checked too ("of log-probs").
    """
    assert isinstance(variant, Variant)
    num_rows, vocab, num_edges = (40 if variant.few_rows else 150), 600, 200
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).to(device)

    hidden = draw(num_rows, variant.dim, size=3 * variant.dim**-0.5).to(variant.dtype)  # logits of size 3
    weight = draw(vocab, variant.dim).to(variant.dtype)
    bias = draw(vocab) if variant.bias else None
    incoming = draw(num_edges), draw(num_rows)
    rows = torch.randint(num_rows, (num_edges,), generator=generator).to(device)
    targets = torch.randint(vocab, (num_edges,), generator=generator).to(device)
    temperature, softcap = 0.7, (20.0 if variant.softcap else None)
    tiles = tiles_for(architecture_of(device), variant.dtype, num_rows)

    def results(dtype: torch.dtype, triton_kernels: bool) -> dict[str, torch.Tensor]:
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
        if triton_kernels:
            logprobs, entropy = tiled_linear_logprob(
                h, w, targets, rows, bias, temperature, variant.entropy, softcap,
                tiles=tiles, splits=2, chunk_logits=num_rows * 256,
            )  # fmt: skip
        else:
            logprobs, entropy = reference_linear_logprob(h, w, targets, rows, bias, temperature, softcap)
        found, loss = {"logprobs": logprobs}, (logprobs * incoming[0]).sum()
        losses = {"": loss}
        if variant.entropy and entropy is not None:
            found["entropy"] = entropy
            losses = {"": loss + (entropy * incoming[1]).sum(), " of log-probs": loss}
        for name, one in losses.items():
            dhidden, dweight = torch.autograd.grad(one, [h, w], retain_graph=True)
            found |= {f"dhidden{name}": dhidden, f"dweight{name}": dweight}
        return found

    ours, plain = results(variant.dtype, True), results(variant.dtype, False)
    return deviations_of(ours, plain, results(torch.float64, False), variant.dtype)
