"""Prefill: the keys and values of tree nodes that are not ready, each token computed once.

A chunk is a packed row of tokens, whatever nodes they are of: nothing but attention cares. For attention,
segments of like shape are one padded batch (a block), in which a segment's keys are the tokens of its path:
key j has position j.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mosaic_rollout.engine.adapter import CausalModel, KeyValueShape
from mosaic_rollout.engine.attention import Scores, grouped_attention, visible_keys
from mosaic_rollout.engine.radix import Node
from mosaic_rollout.engine.recurrent import States
from mosaic_rollout.engine.rows import KeyValuePool
from mosaic_rollout.engine.segments import Segments

PADDED_PAIRS = 4096
"""(query, key) pairs of padding that are cheaper than another call: 50 us for a model of 1 M parameters."""

BLOCK_KEYS = 8192
"""Keys gathered at a time, unless one sequence has more."""


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of a node, as offsets in it; those before `start` are computed."""

    node: Node
    start: int
    end: int

    @property
    def queries(self) -> int:
        return self.end - self.start

    @property
    def keys(self) -> int:
        """Tokens on the path down to its last one, itself included."""
        return self.node.start + self.end


def pending_nodes(ends: Sequence[Node]) -> list[Node]:
    """The nodes not ready on the paths down to `ends`, each once, parents first."""
    seen: dict[int, Node] = {}
    for end in ends:
        for node in end.path():
            if not node.ready:
                seen.setdefault(id(node), node)
    return list(seen.values())


def cut(nodes: Sequence[Node], chunk_tokens: int) -> Iterator[list[Segment]]:
    """Deal the nodes' tokens out, in order, to chunks of at most `chunk_tokens` tokens.

    A node is not cut where it may begin a chunk of its own and leaves the one before at least half full:
    equal nodes are one block, pieces of them several.
    """
    chunk: list[Segment] = []
    room = chunk_tokens
    for node in nodes:
        start = 0
        if room < len(node.tokens) <= chunk_tokens and 2 * room <= chunk_tokens:
            yield chunk
            chunk, room = [], chunk_tokens
        while start < len(node.tokens):
            end = min(len(node.tokens), start + room)
            chunk.append(Segment(node, start, end))
            room -= end - start
            start = end
            if not room:
                yield chunk
                chunk, room = [], chunk_tokens
    if chunk:
        yield chunk


def blocks_of(segments: Sequence[Segment]) -> list[list[int]]:
    """Indices of the segments, by block: those that padding to one shape costs less than a call of their own.

    What is padded is at most PADDED_PAIRS a segment; a block's keys are at most BLOCK_KEYS, or one segment's.
    """
    blocks: list[list[int]] = []
    longest = most = 0  # of the last block: queries, keys
    for index in sorted(range(len(segments)), key=lambda i: (segments[i].keys, segments[i].queries)):
        segment = segments[index]
        queries, keys = max(longest, segment.queries), max(most, segment.keys)
        count = len(blocks[-1]) if blocks else 0
        more = (count + 1) * queries * keys - count * longest * most - segment.queries * segment.keys
        if count and more <= PADDED_PAIRS and (count + 1) * keys <= BLOCK_KEYS:
            blocks[-1].append(index)
            longest, most = queries, keys
        else:
            blocks.append([index])
            longest, most = segment.queries, segment.keys
    return blocks


class _Block:
    """R segments of a chunk, padded to t queries and k keys."""

    def __init__(self, segments: Sequence[Segment], offsets: Sequence[int], shape: KeyValueShape) -> None:
        """offsets: where in the chunk the segments begin."""
        rows = len(segments)
        longest, keys = max(s.queries for s in segments), max(s.keys for s in segments)
        query = np.zeros(
            (rows, longest), np.int64
        )  # padded ones compute the chunk's first query, at position 0
        positions = np.zeros((rows, longest), np.int64)
        slots = np.zeros((rows, keys), np.int64)  # padded ones are masked
        filled = np.zeros((rows, longest), bool)
        for row, (segment, offset) in enumerate(zip(segments, offsets, strict=True)):
            count = segment.queries
            query[row, :count] = np.arange(offset, offset + count)
            positions[row, :count] = np.arange(segment.keys - count, segment.keys)
            path = np.concatenate([node.slots for node in segment.node.path()])
            slots[row] = path[0]
            slots[row, : segment.keys] = path[: segment.keys]
            filled[row, :count] = True
        self._rows, self._keys = rows, keys
        self._same = all((s.queries, s.keys) == (longest, keys) for s in segments)
        self._causal = self._same and longest == keys
        self._shape = shape
        self._queries, self._slots, self._outputs = (
            torch.from_numpy(a).to(shape.device) for a in (query.ravel(), slots.ravel(), query[filled])
        )
        kept = filled.ravel().nonzero()[0]
        self._kept = None if filled.all() else torch.from_numpy(kept).to(shape.device)
        self._positions = torch.from_numpy(positions[:1] if self._same else positions).to(shape.device)
        self._masks: dict[tuple[int | None, int | None], Tensor | None] = {}

    def attend(
        self,
        query: Tensor,  # [T, Hq, D]
        keys: Tensor,  # [Hkv, slots, D]
        values: Tensor,  # [Hkv, slots, Dv]
        scores: Scores,
        into: Tensor,  # [T, Hq, Dv]
    ) -> None:
        split = (self._rows, self._keys)
        attended = grouped_attention(
            query.index_select(0, self._queries).unflatten(0, (self._rows, -1)).transpose(1, 2),
            keys.index_select(1, self._slots).unflatten(1, split).transpose(0, 1),
            values.index_select(1, self._slots).unflatten(1, split).transpose(0, 1),
            self._mask(scores),
            scores,
        )
        rows = attended.transpose(1, 2).flatten(0, 1)  # [R t, Hq, Dv]
        into.index_copy_(0, self._outputs, rows if self._kept is None else rows.index_select(0, self._kept))

    def _mask(self, scores: Scores) -> Tensor | None:
        if self._causal and scores.see_all(self._keys):
            return None
        if scores.reach not in self._masks:
            mask = visible_keys(self._positions, self._keys, scores, self._shape.dtype)
            self._masks[scores.reach] = mask
        return self._masks[scores.reach]


class _Chunk:
    """The `Attend` of one chunk: keys and values go to their slots, and come from there."""

    def __init__(self, pool: KeyValuePool, segments: Sequence[Segment]) -> None:
        self._pool = pool
        offsets = np.cumsum([0, *(segment.queries for segment in segments)]).tolist()
        slots = np.concatenate([s.node.slots[s.start : s.end] for s in segments])
        self._slots = torch.from_numpy(slots).to(pool.shape.device)
        self._blocks = [
            _Block([segments[i] for i in block], [offsets[i] for i in block], pool.shape)
            for block in blocks_of(segments)
        ]
        self._parts, self._first = segments, []
        if self.wants_states:
            self.segments = self._segments(offsets)
            self._ended: list[dict[int, States]] = [{} for _ in segments]

    @property
    def wants_states(self) -> bool:
        """Whether the model has recurrent layers: what follows is theirs."""
        return bool(self._pool.shape.states)

    def _segments(self, offsets: Sequence[int]) -> Segments:
        """How the tokens hang together; noted is with what those that follow no token of the chunk begin."""
        parent = np.arange(offsets[-1]) - 1
        last = {
            id(part.node): offset + part.queries - 1
            for part, offset in zip(self._parts, offsets, strict=False)
        }
        for part, offset in zip(self._parts, offsets, strict=False):
            above = part.node if part.start else part.node.parent
            parent[offset] = -1 if part.start else last.get(id(above), -1)
            if parent[offset] < 0:
                assert above is not None
                self._first.append(above.states or self._pool.shape.states)
        return Segments.of(parent, self._pool.shape.device, np.array(offsets[:-1]))

    def begin(self, layer: int) -> States:
        return tuple(torch.cat(rows) for rows in zip(*(states[layer] for states in self._first), strict=True))

    def end(self, layer: int, left: States) -> None:
        for number, ended in enumerate(self._ended):
            ended[layer] = tuple(x[number : number + 1].clone() for x in left)

    def leave_states(self) -> None:
        """Give each node the states behind the last of its tokens that is computed."""
        for part, ended in zip(self._parts, self._ended, strict=True):
            part.node.states = ended

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._pool.keys[layer].index_copy_(1, self._slots, key.transpose(0, 1))
        self._pool.values[layer].index_copy_(1, self._slots, value.transpose(0, 1))

    def attend(self, layer: int, query: Tensor, scores: Scores) -> Tensor:
        out = query.new_empty(*query.shape[:2], self._pool.shape.value_dim)
        for block in self._blocks:
            block.attend(query, self._pool.keys[layer], self._pool.values[layer], scores, out)
        return out


def prefill(model: CausalModel, pool: KeyValuePool, nodes: Sequence[Node], chunk_tokens: int) -> int:
    """Compute the nodes (parents first) and mark them ready; returns the number of forwards."""
    device = pool.shape.device
    forwards = 0
    for segments in cut(nodes, chunk_tokens):
        tokens = np.concatenate([s.node.tokens[s.start : s.end] for s in segments])
        positions = np.concatenate([np.arange(s.keys - s.queries, s.keys) for s in segments])
        chunk = _Chunk(pool, segments)
        model.forward(
            torch.from_numpy(tokens).to(device), torch.from_numpy(positions).to(device), chunk, logits=False
        )
        if chunk.wants_states:
            chunk.leave_states()
        forwards += 1
    for node in nodes:
        node.ready = True
    if pool.shape.states:  # each ends with a turn or at a fork
        pool.kept_states += len(nodes)
    return forwards
