"""A forest's index arrays on the model's device, built once and shared by all layers and epochs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mosaic_kernels import PackedForest


@dataclass(frozen=True, eq=False)
class ForestTensors:
    """What a forward over a forest needs, beside the weights.

    U packed positions, T rollout tokens, M of them trained; E distinct trained edges (an edge belongs to the
    node it leads to, however many rollouts train it); N rows, the packed positions that predict an edge. All
    tensors are int64. Edges are ordered by row, then by node.

    Example: [5, 6, 7] and [5, 6, 8] with every token but the first trained:
        tokens [[5, 6, 7, 8]]   rows [0, 1]   targets [6, 7, 8]   edge_rows [0, 1, 1]
        trained_tokens [1, 2, 4, 5]           token_edges [0, 1, 0, 2]
    """

    tokens: Tensor  # [1, U] token ids
    positions: Tensor  # [1, U] depth: the position in every rollout through the node
    subtree_end: Tensor  # [U]
    rows: Tensor  # [N] packed positions with a trained child, ascending
    targets: Tensor  # [E] token id of each edge
    edge_rows: Tensor  # [E] index into rows, ascending
    trained_tokens: Tensor  # [M] which of the T rollout tokens are trained
    token_edges: Tensor  # [M] the edge of each
    token_rows: Tensor  # [M] index into rows: where each is predicted
    num_tokens: int  # T
    longest: int  # length of the longest rollout in the pack, 0 if there is none


def forest_tensors(forest: PackedForest, device: torch.device) -> ForestTensors:
    """Find rows and edges of a forest and move all indices to the device."""
    trained_tokens = np.flatnonzero(forest.trained)
    nodes, inverse = np.unique(forest.node_index[trained_tokens], return_inverse=True)
    order = np.argsort(forest.parent[nodes], kind="stable")
    nodes = nodes[order]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    token_edges = rank[inverse]
    rows, edge_rows = np.unique(forest.parent[nodes], return_inverse=True)

    def move(array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    # Tensors made under inference_mode cannot be saved for a later backward, and these outlive the call.
    with torch.inference_mode(False):
        return ForestTensors(
            tokens=move(forest.tokens)[None],
            positions=move(forest.positions)[None],
            subtree_end=move(forest.subtree_end),
            rows=move(rows),
            targets=move(forest.tokens[nodes]),
            edge_rows=move(edge_rows),
            trained_tokens=move(trained_tokens),
            token_edges=move(token_edges),
            token_rows=move(edge_rows[token_edges]),
            num_tokens=forest.num_tokens,
            longest=int(forest.positions.max()) + 1 if forest.num_nodes else 0,
        )
