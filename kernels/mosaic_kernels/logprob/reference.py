"""Edges, that is (row, target) pairs, ordered for kernels: stable sorts on the device, without waiting.

Log-probs and entropies from logits in memory: plain PyTorch autograd, O(N V) memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mosaic_kernels.dispatch import result_dtype


@dataclass(frozen=True, eq=False)
class Groups:
    """E items, group by group."""

    members: torch.Tensor  # [E] int32
    starts: torch.Tensor  # [groups + 1] int32


def edges_by_tile(
    rows: torch.Tensor,  # [E] int64
    targets: torch.Tensor,  # [E] int64
    num_rows: int,
    vocab: int,
    block_rows: int,
    block_vocab: int,
) -> Groups:
    """By the tile of logits they fall into: row tile first, vocabulary tile second.

    Example: rows [0, 1, 1], targets [7, 2, 5], tiles of 2 x 4 in a vocabulary of 8: members [1, 0, 2],
    starts [0, 1, 3].
    """
    row_tiles, vocab_tiles = -(-num_rows // block_rows), -(-vocab // block_vocab)
    tile = rows // block_rows * vocab_tiles + targets // block_vocab
    return grouped(tile, row_tiles * vocab_tiles)


def edges_by_row(rows: torch.Tensor, num_rows: int) -> Groups:
    return grouped(rows, num_rows)


def grouped(group: torch.Tensor, num_groups: int) -> Groups:
    """The items of each group in their own order; group [E] int64 in [0, num_groups)."""
    ordered, order = torch.sort(group, stable=True)
    bounds = torch.arange(num_groups + 1, device=group.device)
    return Groups(order.int(), torch.searchsorted(ordered, bounds).int())


def reference_linear_logprob(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [E] int64
    rows: torch.Tensor,  # [E] int64
    bias: torch.Tensor | None,  # [V]
    temperature: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # [E], [N]
    """In fp32 or, for fp64 input, fp64."""
    dtype = result_dtype(hidden, weight)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    # A log-prob of -inf has probability 0 and adds 0 to the entropy, not NaN.
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(dtype).min)).sum(-1)
    return logprobs[rows, targets], entropy
