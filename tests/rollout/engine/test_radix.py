"""The radix tree against a set of prefixes, and what eviction may and may not take."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_rollout.engine.adapter import KeyValueShape
from mosaic_rollout.engine.radix import RadixTree
from mosaic_rollout.engine.rows import KeyValuePool

_SHAPE = KeyValueShape(1, 1, 1, 1, torch.float32, torch.device("cpu"))
_SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=25)


def tree_of(max_tokens: int = 10_000) -> RadixTree:
    return RadixTree(KeyValuePool(_SHAPE), max_tokens)


def insert(tree: RadixTree, tokens: list[int]) -> int:
    """How much of `tokens` was known."""
    sequence = np.array(tokens, np.int64)
    node = tree.match(sequence)
    known = node.end
    tree.extend(node, sequence, ready=True)
    return known


def check(tree: RadixTree) -> None:
    """Every node hangs where it says, and no slot is held twice or lost."""
    held: list[int] = []
    for node in tree.nodes():
        assert node.parent is not None
        assert node.start == node.parent.end
        assert node.parent.children[int(node.tokens[0])] is node
        assert len(node.tokens) == len(node.slots) > 0
        held += node.slots.tolist()
    assert len(held) == len(set(held)) == tree.pool.used
    assert sorted([*held, *tree.pool._free.tolist()]) == list(range(tree.pool.keys.shape[2]))


@settings(max_examples=150, deadline=None)
@given(_SEQUENCES)
def test_matches_the_longest_known_prefix_and_stores_each_prefix_once(sequences: list[list[int]]) -> None:
    tree = tree_of()
    prefixes: set[tuple[int, ...]] = {()}
    for tokens in sequences:
        longest = max(n for n in range(len(tokens) + 1) if tuple(tokens[:n]) in prefixes)
        assert insert(tree, tokens) == longest
        prefixes |= {tuple(tokens[:n]) for n in range(len(tokens) + 1)}
        assert tree.pool.used == len(prefixes) - 1
        check(tree)


@settings(max_examples=150, deadline=None)
@given(_SEQUENCES, st.integers(1, 30), st.data())
def test_eviction_keeps_locked_paths_and_the_bound(
    sequences: list[list[int]], max_tokens: int, data: st.DataObject
) -> None:
    tree = tree_of(max_tokens)
    locked: list[tuple[list[int], int]] = []
    for tokens in sequences:
        insert(tree, tokens)
        if data.draw(st.booleans()):
            end = tree.match(np.array(tokens, np.int64))
            tree.lock(end)
            locked.append((tokens, end.end))
        tree.evict()
        check(tree)
        needed = {tuple(kept[:n]) for kept, _ in locked for n in range(1, len(kept) + 1)}
        assert tree.pool.used <= max(max_tokens, len(needed))
        for kept, _ in locked:
            assert tree.match(np.array(kept, np.int64)).end == len(kept)
    for kept, _ in locked:
        tree.lock(tree.match(np.array(kept, np.int64)), -1)
    assert all(node.locks == 0 for node in tree.nodes())
    tree.evict()
    assert tree.pool.used <= max_tokens


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = tree_of(8)
    for tokens in ([1, 1, 1], [2, 2, 2], [1, 1, 1], [3, 3, 3]):  # 1 is used again after 2
        insert(tree, tokens)
    tree.evict()
    assert sorted(tree.root.children) == [1, 3]


def test_a_split_moves_no_slot() -> None:
    tree = tree_of()
    insert(tree, [1, 2, 3, 4])
    before = tree.match(np.array([1, 2, 3, 4])).slots.tolist()
    assert insert(tree, [1, 2, 5]) == 2
    path = tree.match(np.array([1, 2, 3, 4])).path()
    assert [node.tokens.tolist() for node in path] == [[1, 2], [3, 4]]
    assert [slot for node in path for slot in node.slots.tolist()] == before
