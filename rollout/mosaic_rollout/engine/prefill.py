"""Prefill: the keys and values of tree nodes that are not ready, each token computed once.

Nodes are not padded into a batch and need no level-by-level order: a chunk is a packed row of tokens, and
its keys are all tokens on the paths down to them, in depth-first order. With `subtree_end[k]` the index
after the last key below k, a query at key index q sees k iff `k <= q < subtree_end[k]`: the trainer's
forest mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import Cache

from .adapter import CausalModel
from .pool import KeyValuePool
from .radix import Node

MASKED_PAIRS = 65_536
"""Pairs a chunk may compute in vain: about as dear as the forward another chunk would need, both for a model
of 1 M parameters (1 k multiply-adds a pair, some ms a forward) and for one of 100 M (35 k; 0.1 s)."""


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of a node, as offsets in it; those before `start` are computed."""

    node: Node
    start: int
    end: int


@dataclass(frozen=True)
class Chunk:
    """One forward: T queries, K keys."""

    tokens: np.ndarray  # [T] int64
    positions: np.ndarray  # [T] int64
    slots: np.ndarray  # [T] int64, where the new keys and values go
    query_keys: np.ndarray  # [T] int64, index among the keys of each query's own key
    key_slots: np.ndarray  # [K] int64
    key_positions: np.ndarray  # [K] int64
    subtree_end: np.ndarray  # [K] int64


def pending_nodes(ends: Sequence[Node]) -> list[Node]:
    """The nodes not ready on the paths down to `ends`, each once, parents first."""
    seen: dict[int, Node] = {}
    for end in ends:
        for node in end.path():
            if not node.ready:
                seen.setdefault(id(node), node)
    return list(seen.values())


def cut(
    nodes: Sequence[Node], chunk_tokens: int, masked_pairs: int = MASKED_PAIRS
) -> Iterator[list[Segment]]:
    """Deal the nodes' tokens out, in order, to chunks of at most `chunk_tokens` tokens.

    A chunk is closed early where one more node would raise the (query, key) pairs masked between nodes above
    `masked_pairs`: neighbours that share little pay for each other's keys.
    """
    chunk: list[Segment] = []
    shown: set[int] = set()  # id of each node with keys in the chunk
    queries = keys = alone = 0  # alone: pairs of the chunk's nodes if each were a chunk of its own
    for node in nodes:
        start = 0
        while start < len(node.tokens):
            count = min(len(node.tokens) - start, chunk_tokens - queries)
            more_keys = count + sum(len(n.tokens) for n in node.path()[:-1] if id(n) not in shown)
            more_keys += 0 if id(node) in shown else start
            more_alone = count * (node.start + start + count)
            masked = (queries + count) * (keys + more_keys) - alone - more_alone
            if chunk and (count == 0 or masked > masked_pairs):
                yield chunk
                chunk, shown = [], set()
                queries = keys = alone = 0
                continue
            chunk.append(Segment(node, start, start + count))
            shown.update(id(n) for n in node.path())
            queries, keys, alone = queries + count, keys + more_keys, alone + more_alone
            start += count
    if chunk:
        yield chunk


def lay_out(segments: Sequence[Segment]) -> Chunk:
    """Depth-first layout of the segments and all that is above them."""
    shown: dict[int, int] = {}  # id of a node -> how many of its tokens are keys
    below: dict[int, list[Node]] = {}
    roots: list[Node] = []
    for segment in segments:
        for node in segment.node.path():
            if id(node) not in shown:
                assert node.parent is not None
                (below.setdefault(id(node.parent), []) if node.parent.parent else roots).append(node)
            shown[id(node)] = segment.end if node is segment.node else len(node.tokens)
    key_slots: list[np.ndarray] = []
    key_positions: list[np.ndarray] = []
    first: dict[int, int] = {}  # id of a node -> index of its first key
    last: list[tuple[int, int]] = []  # (id of a node, index after the last key below it)
    count = 0
    stack: list[tuple[Node, bool]] = [(node, False) for node in reversed(roots)]
    while stack:
        node, left = stack.pop()
        if left:
            last.append((id(node), count))
            continue
        first[id(node)] = count
        size = shown[id(node)]
        key_slots.append(node.slots[:size])
        key_positions.append(np.arange(node.start, node.start + size))
        count += size
        stack.append((node, True))
        stack.extend((child, False) for child in reversed(below.get(id(node), [])))
    subtree_end = np.empty(count, np.int64)
    for key, end in last:
        subtree_end[first[key] : first[key] + shown[key]] = end
    spans = [(s.node, s.start, s.end) for s in segments]
    return Chunk(
        tokens=np.concatenate([node.tokens[a:b] for node, a, b in spans]),
        positions=np.concatenate([np.arange(node.start + a, node.start + b) for node, a, b in spans]),
        slots=np.concatenate([node.slots[a:b] for node, a, b in spans]),
        query_keys=np.concatenate(
            [np.arange(first[id(node)] + a, first[id(node)] + b) for node, a, b in spans]
        ),
        key_slots=np.concatenate(key_slots),
        key_positions=np.concatenate(key_positions),
        subtree_end=subtree_end,
    )


class _ChunkCache(Cache):
    """Writes a chunk's keys and values to their slots and shows it those of all its paths."""

    def __init__(self, pool: KeyValuePool, chunk: Chunk) -> None:
        super().__init__(layers=[])
        self._pool = pool
        device = pool.shape.device
        self._slots = torch.from_numpy(chunk.slots).to(device)
        self._key_slots = torch.from_numpy(chunk.key_slots).to(device)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, Hkv, T, D] new -> [1, Hkv, K, D] visible, for keys and values."""
        keys = self._swap(self._pool.keys[layer_idx], key_states)
        return keys, self._swap(self._pool.values[layer_idx], value_states)

    def _swap(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        stored.index_copy_(1, self._slots, new[0])
        return stored.index_select(1, self._key_slots)[None]


def prefill(model: CausalModel, pool: KeyValuePool, nodes: Sequence[Node], chunk_tokens: int) -> int:
    """Compute the nodes (parents first) and mark them ready; returns the number of forwards."""
    device = pool.shape.device
    forwards = 0
    for segments in cut(nodes, chunk_tokens):
        chunk = lay_out(segments)
        keys = np.arange(len(chunk.key_slots))
        query = chunk.query_keys[:, None]  # [T, 1]
        visible = torch.from_numpy((keys <= query) & (query < chunk.subtree_end))  # [T, K]
        tokens, positions, key_positions = (
            torch.from_numpy(array).to(device)[None]
            for array in (chunk.tokens, chunk.positions, chunk.key_positions)
        )
        model.forward(tokens, positions, visible.to(device)[None], key_positions, _ChunkCache(pool, chunk))
        forwards += 1
    for node in nodes:
        node.ready = True
    return forwards
