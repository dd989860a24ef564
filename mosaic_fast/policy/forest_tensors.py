"""The index arrays of one forward on the model's device, built once and shared by all layers and epochs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mosaic_kernels import PackedForest
from mosaic_rollout.engine.segments import Segments

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ForestTensors:
    """What a forward over a forest, or over some of its nodes, needs beside the weights.

    U forwarded nodes behind C held ones, whose keys and values are already there; T rollout tokens of the
    forest, M of them trained and predicted at one of the U nodes; E distinct trained edges (an edge belongs
    to the node it leads to, however many rollouts train it); N rows, the forwarded nodes that predict one.
    All tensors are int64. Edges are ordered by row, then by node.

    Example: [5, 6, 7] and [5, 6, 8] with every token but the first trained:
        tokens [[5, 6, 7, 8]]   rows [0, 1]   targets [6, 7, 8]   edge_rows [0, 1, 1]
        trained_tokens [1, 2, 4, 5]           token_edges [0, 1, 0, 2]
    The same with the first two nodes held forwards [[7, 8]], and owns no edge: both are predicted above.
    """

    tokens: Tensor  # [1, U] token ids
    positions: Tensor  # [1, U] depth: the position in every rollout through the node
    subtree_end: Tensor  # [C + U]
    key_positions: Tensor  # [C + U] depth of held and forwarded nodes
    queries: Tensor | None  # [U] = C, C + 1, ...: the forwarded nodes among the keys; None: nothing is held
    rows: Tensor  # [N] forwarded nodes with a trained child, ascending
    row_queries: Tensor  # [N] the same among the keys
    targets: Tensor  # [E] token id of each edge
    edge_rows: Tensor  # [E] index into rows, ascending
    trained_tokens: Tensor  # [M] which of the T rollout tokens are trained
    uncut_tokens: Tensor  # [M] the same among the tokens of the forest that this one was cut from, if it was
    token_edges: Tensor  # [M] the edge of each
    token_rows: Tensor  # [M] index into rows: where each is predicted
    num_tokens: int  # T
    longest: int  # longest path from a root to a forwarded node in tokens, 0 if there is none
    parent: IntArray  # [U] NumPy: parents among the forwarded nodes, -1 where there is none

    @cached_property
    def segments(self) -> Segments:
        """For layers that hand a state from token to token; no other asks for it."""
        with torch.inference_mode(False):
            return Segments.of(self.parent, self.tokens.device)


def forest_tensors(
    forest: PackedForest,
    device: torch.device,
    nodes: IntArray | None = None,
    held: IntArray | None = None,
) -> ForestTensors:
    """Find rows and edges of a forest and move all indices to the device.

    nodes: [U] rising; None: all. held: [C] a path from a root, whose every node is above each of `nodes`.
    """
    held = np.zeros(0, np.int64) if held is None else held
    if nodes is None:
        nodes, end, index = np.arange(forest.num_nodes), forest.subtree_end, np.arange(forest.num_nodes)
    else:
        end = np.searchsorted(nodes, forest.subtree_end[nodes])
        index = np.full(forest.num_nodes, -1)
        index[nodes] = np.arange(len(nodes))
    # A rollout's first token is never trained, so a trained one has a parent.
    trained_tokens = np.flatnonzero(forest.trained)
    predicted_here = index[forest.parent[forest.node_index[trained_tokens]]] >= 0
    trained_tokens = trained_tokens[predicted_here]
    children, inverse = np.unique(forest.node_index[trained_tokens], return_inverse=True)
    order = np.argsort(forest.parent[children], kind="stable")
    children = children[order]
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    token_edges = rank[inverse]
    rows, edge_rows = np.unique(index[forest.parent[children]], return_inverse=True)
    positions = forest.positions[nodes]

    def move(array: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    # Tensors made under inference_mode cannot be saved for a later backward, and these outlive the call.
    with torch.inference_mode(False):
        return ForestTensors(
            tokens=move(forest.tokens[nodes])[None],
            positions=move(positions)[None],
            subtree_end=move(np.append(np.full(len(held), len(held) + len(nodes)), end + len(held))),
            key_positions=move(np.append(forest.positions[held], positions)),
            queries=move(np.arange(len(nodes)) + len(held)) if len(held) else None,
            rows=move(rows),
            row_queries=move(rows + len(held)),
            targets=move(forest.tokens[children]),
            edge_rows=move(edge_rows),
            trained_tokens=move(trained_tokens),
            uncut_tokens=move(trained_tokens if forest.source is None else forest.source[trained_tokens]),
            token_edges=move(token_edges),
            token_rows=move(edge_rows[token_edges]),
            num_tokens=forest.num_tokens,
            longest=int(positions.max()) + 1 if len(nodes) else 0,
            parent=np.where(forest.parent[nodes] < 0, -1, index[forest.parent[nodes]]),
        )
