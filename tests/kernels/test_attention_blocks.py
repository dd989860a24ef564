"""Block lists against the dense mask: nothing visible is skipped, nothing hidden is called visible."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import PackedForest
from mosaic_kernels.attention.blocks import BlockLists, tree_for
from tests.kernels.strategies import forests, seeds


def dense_mask(forest: PackedForest, rows: np.ndarray, window: int | None, chunk: int | None) -> np.ndarray:
    """[rows, U] bool."""
    key = np.arange(forest.num_nodes)
    visible = (key[None, :] <= rows[:, None]) & (rows[:, None] < forest.subtree_end[None, :])
    if window is not None:
        visible &= forest.positions[rows][:, None] - forest.positions[None, :] < window
    if chunk is not None:
        visible &= forest.positions[rows][:, None] // chunk == forest.positions[None, :] // chunk
    return visible


def listed(lists: BlockLists, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The lists as two bool matrices: visited, and visited without a mask."""
    visited, full = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    blocks = lists.blocks.numpy()
    for block, first, masked, stop in lists.work.tolist():
        assert len(set(blocks[first:stop])) == stop - first, "a block is listed once"
        visited[block, blocks[first:stop]] = True
        full[block, blocks[first:masked]] = True
    return visited, full


@settings(max_examples=150)
@given(
    forest=forests(min_rollouts=1, max_rollouts=10),
    seed=seeds,
    block_q=st.integers(1, 9),
    block_k=st.integers(1, 9),
    reach=st.sampled_from([(None, None), (1, None), (4, None), (12, None), (None, 1), (None, 5)]),
    share=st.sampled_from([1.0, 0.3]),
)
def test_lists_are_the_mask(
    forest: PackedForest,
    seed: int,
    block_q: int,
    block_k: int,
    reach: tuple[int | None, int | None],
    share: float,
) -> None:
    window, chunk = reach
    rows = np.flatnonzero(np.random.default_rng(seed).random(forest.num_nodes) <= share)
    if not len(rows):
        return
    tree = tree_for(
        torch.from_numpy(forest.subtree_end),
        torch.from_numpy(rows),
        torch.from_numpy(forest.positions),
        window,
        chunk,
    )
    mask = dense_mask(forest, rows, window, chunk)
    missing = -len(rows) % block_q, -forest.num_nodes % block_k
    # Past the end no key exists, and queries see whatever is convenient.
    some = np.pad(mask, ((0, missing[0]), (0, missing[1])))
    every = np.pad(np.pad(mask, ((0, missing[0]), (0, 0)), constant_values=True), ((0, 0), (0, missing[1])))

    def by_block(one: np.ndarray) -> np.ndarray:
        return one.reshape(some.shape[0] // block_q, block_q, some.shape[1] // block_k, block_k)

    any_visible, all_visible = by_block(some).any((1, 3)), by_block(every).all((1, 3))
    for lists, transposed in (
        (tree.lists(block_q, block_k, by_key=False), False),
        (tree.lists(block_q, block_k, by_key=True), True),
    ):
        shape = any_visible.T.shape if transposed else any_visible.shape
        visited, full = (x.T if transposed else x for x in listed(lists, shape))
        assert (visited >= any_visible).all(), "a visible pair is skipped"
        assert (full <= all_visible).all(), "a hidden pair is taken for visible"
        if share == 1.0 and reach == (None, None):
            assert (visited == any_visible).all(), "a block without visible pairs is visited"
            assert (full == all_visible).all(), "a full block is masked"
        lengths = [stop - first for _, first, _, stop in lists.work.tolist()]
        assert lengths == sorted(lengths, reverse=True), "longest first"
        assert sorted(lists.work[:, 0].tolist()) == list(range(shape[0]))


def test_a_tree_is_kept_with_the_tensor_it_describes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers share the lists; another version of the tensor, or another window, gets its own."""
    from mosaic_kernels.attention import blocks

    made = []
    make = blocks._make_tree
    monkeypatch.setattr(blocks, "_make_tree", lambda *args: made.append(args) or make(*args))
    end, depth = torch.tensor([3, 3, 3], device="meta"), torch.arange(3, device="meta")
    first = tree_for(end, None, depth, None)
    assert tree_for(end, None, depth, None) is first
    assert tree_for(end, None, depth, 2) is not tree_for(end, None, depth, None, 2)
    end.add_(0)
    assert tree_for(end, None, depth, None) is not first
    assert len(made) == 4
