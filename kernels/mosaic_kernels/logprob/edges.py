"""Edges, that is (row, target) pairs, ordered for kernels that work on tiles of logits. On the device."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class EdgeLists:
    """E edges of an [N, V] matrix of logits, listed by tile and by row."""

    rows: torch.Tensor  # [E] int32
    targets: torch.Tensor  # [E] int32
    tile_edges: torch.Tensor  # [E] int32, ordered by tile: row tile first, vocabulary tile second
    tile_starts: torch.Tensor  # [row tiles * vocabulary tiles + 1] int32
    row_edges: torch.Tensor  # [E] int32, ordered by row
    row_starts: torch.Tensor  # [N + 1] int32


def list_edges(
    rows: torch.Tensor,  # [E] int64
    targets: torch.Tensor,  # [E] int64
    num_rows: int,
    vocab: int,
    block_rows: int,
    block_vocab: int,
) -> EdgeLists:
    """Both orders by stable sorts, without waiting for the device.

    Example: rows [0, 1, 1], targets [7, 2, 5], tiles of 2 x 4 in a vocabulary of 8: tile_edges [1, 0, 2],
    tile_starts [0, 1, 3].
    """
    row_tiles, vocab_tiles = -(-num_rows // block_rows), -(-vocab // block_vocab)
    tile_of_edge = rows // block_rows * vocab_tiles + targets // block_vocab
    tile_edges, tile_starts = _grouped(tile_of_edge, row_tiles * vocab_tiles)
    row_edges, row_starts = _grouped(rows, num_rows)
    return EdgeLists(rows.int(), targets.int(), tile_edges, tile_starts, row_edges, row_starts)


def _grouped(group: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that puts [E] items group by group [E], and where each group starts [num_groups + 1]."""
    ordered, order = torch.sort(group, stable=True)
    bounds = torch.arange(num_groups + 1, device=group.device)
    return order.int(), torch.searchsorted(ordered, bounds).int()
