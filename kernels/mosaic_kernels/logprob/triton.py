"""linear_logprob by Triton kernels and, in the backward pass, matrix products over chunks of the vocabulary."""

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from mosaic_kernels.dispatch import emulated
from mosaic_kernels.logprob.edges import EdgeLists, list_edges
from mosaic_kernels.logprob.kernels import backward_kernel, forward_kernel, merge_kernel, row_gradient_kernel
from mosaic_kernels.logprob.tiles import Tile

CHUNK_LOGITS = 2**27  # dL/dlogits in memory at a time: 256 MiB in 16 bits
PROGRAMS_PER_MULTIPROCESSOR = (
    4  # of the forward pass: the last wave of programs is then at most a quarter idle
)
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
    *,
    tile: Tile,
    splits: int | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # [E] fp32, [N] fp32 or None
    """Without entropy, rows that no target needs are not computed.

    splits is into how many shares the forward pass cuts the vocabulary; None: enough to fill the device.
    """
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if not return_entropy:
        used, rows = torch.unique(rows, return_inverse=True)
        if len(used) < len(hidden):
            hidden = hidden.index_select(0, used)
    logprobs, entropy = _TritonLogprob.apply(
        hidden.to(dtype).contiguous(), weight.to(dtype).contiguous(),
        None if bias is None else bias.float().contiguous(),
        list_edges(rows, targets, len(hidden), len(weight), tile.rows, tile.vocab),
        1.0 / temperature, softcap, return_entropy, tile, splits, chunk_logits,
    )  # fmt: skip
    return logprobs, entropy


class _TritonLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [N, D] contiguous
        weight: torch.Tensor,  # [V, D] contiguous
        bias: torch.Tensor | None,  # [V] fp32
        edges: EdgeLists,
        inverse_temperature: float,
        softcap: float | None,
        return_entropy: bool,
        tile: Tile,
        splits: int | None,
        chunk_logits: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        num_rows, vocab = len(hidden), len(weight)
        row_tiles, vocab_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(vocab, tile.vocab)
        wanted = min(_default_splits(row_tiles, hidden.device) if splits is None else splits, vocab_tiles)
        tiles_per_split = triton.cdiv(vocab_tiles, max(wanted, 1))
        num_splits = triton.cdiv(vocab_tiles, max(tiles_per_split, 1))

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=hidden.device)

        row_max, row_log_sum, edge_logits = empty(num_rows), empty(num_rows), empty(len(edges.rows))
        entropy = empty(num_rows) if return_entropy else None
        if num_rows:
            highest, total = empty(num_splits, num_rows), empty(num_splits, num_rows)
            weighted = empty(num_splits, num_rows) if return_entropy else highest
            forward_kernel[(row_tiles, num_splits)](
                hidden, weight, weight if bias is None else bias,
                edges.rows, edges.targets, edges.tile_edges, edges.tile_starts,
                highest, total, weighted, edge_logits,
                num_rows, vocab, tiles_per_split, inverse_temperature, softcap or 1.0,
                ENTROPY=return_entropy, **_constants(hidden, tile, bias, softcap),
            )  # fmt: skip
            merge_kernel[(triton.cdiv(num_rows, BLOCK),)](
                highest, total, weighted, row_max, row_log_sum, row_max if entropy is None else entropy,
                num_rows, num_splits, BLOCK=BLOCK, ENTROPY=return_entropy,
            )  # fmt: skip
        logprobs = (edge_logits - row_max[edges.rows]) - row_log_sum[edges.rows]
        ctx.save_for_backward(hidden, weight, bias, row_max, row_log_sum, entropy)
        ctx.edges, ctx.tile, ctx.chunk_logits = edges, tile, chunk_logits
        ctx.inverse_temperature, ctx.softcap = inverse_temperature, softcap
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]
    def backward(
        ctx: Any,
        *grad_outputs: Any,  # [E] and [N] or None
    ) -> tuple[torch.Tensor | None, ...]:
        grad_edges, grad_entropy = grad_outputs
        hidden, weight, bias, row_max, row_log_sum, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        edges, tile = ctx.edges, ctx.tile
        num_rows, vocab = len(hidden), len(weight)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if needs_bias else None
        grad_rows = torch.empty_like(row_max)
        if grad_edges is not None and num_rows:
            grad_edges = grad_edges.float().contiguous()
            row_gradient_kernel[(triton.cdiv(num_rows, BLOCK),)](
                grad_edges, edges.row_edges, edges.row_starts, grad_rows, num_rows, BLOCK=BLOCK
            )
        grad_entropy = None if grad_entropy is None else grad_entropy.float().contiguous()
        tiles = max(1, ctx.chunk_logits // (tile.vocab * max(num_rows, 1)))
        width = min(tiles, triton.cdiv(vocab, tile.vocab)) * tile.vocab
        grad_logits = hidden.new_empty(num_rows, width)
        for first in range(0, vocab, width):
            columns = min(width, vocab - first)
            chunk = grad_logits[:, :columns]
            if num_rows:
                backward_kernel[(triton.cdiv(num_rows, tile.rows), triton.cdiv(columns, tile.vocab))](
                    hidden, weight, weight if bias is None else bias,
                    edges.rows, edges.targets, edges.tile_edges, edges.tile_starts, row_max, row_log_sum,
                    row_max if entropy is None else entropy,
                    row_max if grad_edges is None else grad_edges, grad_rows,
                    row_max if grad_entropy is None else grad_entropy, grad_logits,
                    num_rows, vocab, first, columns, width, ctx.inverse_temperature, ctx.softcap or 1.0,
                    EDGES=grad_edges is not None, ENTROPY=grad_entropy is not None,
                    **_constants(hidden, tile, bias, ctx.softcap),
                )  # fmt: skip
            if grad_hidden is not None:
                grad_hidden += _product(chunk, weight[first : first + columns])
            if grad_weight is not None:
                torch.mm(chunk.T, hidden, out=grad_weight[first : first + columns])
            if grad_bias is not None:
                torch.sum(chunk, 0, dtype=torch.float32, out=grad_bias[first : first + columns])
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 7


def _constants(
    hidden: torch.Tensor, tile: Tile, bias: torch.Tensor | None, softcap: float | None
) -> dict[str, int | bool | str]:
    return {
        "D": hidden.shape[1],
        "BLOCK_ROWS": tile.rows,
        "BLOCK_VOCAB": tile.vocab,
        "BLOCK_DIM": tile.dim,
        "BIAS": bias is not None,
        "SOFTCAP": softcap is not None,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _default_splits(row_tiles: int, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, row_tiles)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32: chunks are added up, and 16 bits would round each of them."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and not emulated():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
