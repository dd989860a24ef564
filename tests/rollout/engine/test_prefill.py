"""How prefill deals tokens out to forwards and attention, and that padding is never seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaic_rollout.engine.adapter import KeyValueShape
from mosaic_rollout.engine.prefill import BLOCK_KEYS, PADDED_PAIRS, Segment, blocks_of, cut
from mosaic_rollout.engine.radix import Node
from tests.rollout.engine.helpers import (
    generate,
    local_engine,
    naive_sample,
    random_tokens,
    request,
    tiny_model,
)


def chain(lengths: list[int]) -> list[Node]:
    """Nodes one below the other."""
    nodes: list[Node] = []
    above = Node(None, 0, np.empty(0, np.int64), np.empty(0, np.int64), ready=True)
    for length in lengths:
        above = Node(above, above.end, np.arange(length), np.arange(above.end, above.end + length), False)
        nodes.append(above)
    return nodes


@given(st.lists(st.integers(1, 40), max_size=9), st.integers(1, 30))
def test_every_token_is_computed_once_in_order(lengths: list[int], chunk_tokens: int) -> None:
    nodes = chain(lengths)
    chunks = list(cut(nodes, chunk_tokens))
    sizes = [sum(s.queries for s in chunk) for chunk in chunks]
    assert all(2 * size >= chunk_tokens for size in sizes[:-1])
    assert all(0 < size <= chunk_tokens for size in sizes)
    computed = [(id(s.node), at) for chunk in chunks for s in chunk for at in range(s.start, s.end)]
    assert computed == [(id(node), at) for node in nodes for at in range(len(node.tokens))]


def test_nodes_that_fit_are_not_cut_where_chunks_stay_half_full() -> None:
    chunks = list(cut(chain([127] * 9), 512))
    assert [[s.queries for s in chunk] for chunk in chunks] == [[127] * 4, [127] * 4, [127]]
    assert [[s.queries for s in c] for c in cut(chain([40, 100, 300]), 100)] == [
        [40, 60],
        [40, 60],
        [100],
        [100],
        [40],
    ]


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 200)), max_size=30))
def test_blocks_hold_every_segment_once_and_pad_little(shapes: list[tuple[int, int]]) -> None:
    segments = [
        Segment(Node(None, start, np.empty(count), np.empty(count), False), 0, count)
        for start, count in shapes
    ]
    blocks = blocks_of(segments)
    assert sorted(index for block in blocks for index in block) == list(range(len(segments)))
    for block in blocks:
        queries, keys = max(segments[i].queries for i in block), max(segments[i].keys for i in block)
        padded = len(block) * queries * keys - sum(segments[i].queries * segments[i].keys for i in block)
        assert padded <= PADDED_PAIRS * (len(block) - 1)
        assert len(block) == 1 or len(block) * keys <= BLOCK_KEYS


def test_equal_segments_are_one_block_without_padding() -> None:
    segments = [Segment(Node(None, 0, np.empty(64), np.empty(64), False), 0, 64) for _ in range(50)]
    assert [len(block) for block in blocks_of(segments)] == [50]


def test_what_was_never_written_is_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # a hidden key has probability 0, but 0 * NaN is NaN
    allocate = KeyValueShape.allocate

    def poisoned(self: KeyValueShape, *sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = allocate(self, *sizes)
        return keys.fill_(torch.nan), values.fill_(torch.nan)

    monkeypatch.setattr(KeyValueShape, "allocate", poisoned)
    model = tiny_model()
    shared = random_tokens(20, 0)
    prompts = [np.concatenate([shared[: 20 - 3 * key], random_tokens(4 + key, key)]) for key in range(5)]
    asked = [request(prompt, 5, key=key) for key, prompt in enumerate(prompts)]
    for chunk_tokens in (7, 512):
        engine = local_engine(model, prefill_chunk_tokens=chunk_tokens)
        found = [completion.token_ids.tolist() for completion in generate(engine, asked)]
        assert found == [naive_sample(model, one) for one in asked]
