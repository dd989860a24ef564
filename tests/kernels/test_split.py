"""split_forest: budget, ownership, exact sums, fewest repeated tokens."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import PackedForest, linear_logprob, pack_forest, split_forest, tree_attention
from tests.kernels.strategies import VOCAB, forests


def budget(forest: PackedForest) -> st.SearchStrategy[int]:
    longest = int(np.diff(forest.cu_seqlens).max(initial=1))
    return st.integers(max(longest, 1), max(longest, forest.num_nodes) + 2)


def rollouts_of(forest: PackedForest) -> list[list[int]]:
    tokens = forest.tokens[forest.node_index].tolist()
    return [tokens[a:b] for a, b in itertools.pairwise(forest.cu_seqlens.tolist())]


@given(st.data())
def test_parts_are_forests_that_own_each_token_once(data: st.DataObject) -> None:
    forest = data.draw(forests(max_rollouts=10))
    max_tokens = data.draw(budget(forest))
    parts = split_forest(forest, max_tokens)
    owned = np.zeros(forest.num_tokens, np.int64)
    covered = np.zeros(forest.num_nodes, np.bool_)
    for part in parts:
        assert 0 < part.num_nodes <= max_tokens
        assert part.source is not None
        again = pack_forest(rollouts_of(part))  # the part is what packing its own rollouts gives
        for name in ("tokens", "positions", "subtree_end", "parent", "node_index", "cu_seqlens"):
            assert getattr(part, name).tolist() == getattr(again, name).tolist(), name
        assert (part.tokens[part.node_index] == forest.tokens[forest.node_index[part.source]]).all()
        assert (part.positions[part.node_index] == forest.positions[forest.node_index[part.source]]).all()
        covered[forest.node_index[part.source]] = True
        owned[part.source[part.trained]] += 1
    assert (owned == forest.trained).all()
    assert covered.all() or not parts
    assert len(parts) == 0 if forest.num_nodes == 0 else len(parts) >= 1


@given(st.data())
def test_repeats_as_little_as_the_best_cut_between_rollouts(data: st.DataObject) -> None:
    """Brute force over all ways to cut the distinct rollouts, in depth-first order, into ranges."""
    forest = data.draw(forests(max_rollouts=6, max_length=8))
    max_tokens = data.draw(budget(forest))
    parts = split_forest(forest, max_tokens)
    distinct = sorted({tuple(s) for s in rollouts_of(forest) if s})
    best: tuple[int, int] | None = None
    for cuts in itertools.product([False, True], repeat=max(len(distinct) - 1, 0)):
        ranges: list[list[tuple[int, ...]]] = [[]]
        for rollout, cut in zip(distinct, [*cuts, False], strict=False):
            ranges[-1].append(rollout)
            if cut:
                ranges.append([])
        sizes = [len({r[: t + 1] for r in chosen for t in range(len(r))}) for chosen in ranges]
        if max(sizes) <= max_tokens:
            best = min(best or (sum(sizes), len(sizes)), (sum(sizes), len(sizes)))
    if distinct:
        assert (sum(part.num_nodes for part in parts), len(parts)) == best


@settings(max_examples=25)
@given(st.data())
def test_gradients_add_up_to_those_of_the_uncut_forest(data: st.DataObject) -> None:
    """A small attention model, fp64; every rollout token has a weight of its own."""
    forest = data.draw(forests(max_rollouts=8, max_length=16, min_rollouts=1))
    max_tokens = data.draw(budget(forest))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weights = torch.randn(forest.num_tokens, generator=generator, dtype=torch.float64)
    embedding = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(part: PackedForest, token_weights: torch.Tensor) -> torch.Tensor:
        place = torch.from_numpy(part.positions)[:, None] * torch.arange(1, 9) * 0.1
        x = (embedding[torch.from_numpy(part.tokens)] + place.sin()).view(-1, 2, 4)
        hidden = tree_attention(x, x, x, part.subtree_end, backend="reference").reshape(-1, 8)
        nodes = part.node_index[part.trained]
        logprobs = linear_logprob(
            hidden, head, part.tokens[nodes], rows=part.parent[nodes], backend="reference"
        )
        return (logprobs * token_weights[torch.from_numpy(part.trained)]).sum()

    uncut = torch.autograd.grad(loss(forest, weights), (embedding, head))
    total = [torch.zeros_like(g) for g in uncut]
    for part in split_forest(forest, max_tokens):
        assert part.source is not None
        grads = torch.autograd.grad(loss(part, weights[torch.from_numpy(part.source)]), (embedding, head))
        total = [a + b for a, b in zip(total, grads, strict=True)]
    for a, b in zip(total, uncut, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_parts_can_be_split_again_and_keep_pointing_at_the_uncut_forest() -> None:
    forest = pack_forest([[1, 2, 3, i, i] for i in range(6)])
    (half, *_) = split_forest(forest, 10)
    smaller = split_forest(half, 5)
    assert half.source is not None
    owned = np.concatenate([part.source[part.trained] for part in smaller if part.source is not None])
    assert sorted(owned.tolist()) == sorted(half.source[half.trained].tolist())


def test_a_shared_trained_edge_is_owned_once_and_its_rollouts_come_along() -> None:
    """The docstring's example: the second rollout appears in the first part up to the edge they share."""
    first, second = split_forest(pack_forest([[5, 6, 7], [5, 6, 8]]), 3)
    assert rollouts_of(first) == [[5, 6, 7], [5, 6]]
    assert first.trained.tolist() == [False, True, True, False, True]
    assert rollouts_of(second) == [[5, 6, 8]]
    assert second.trained.tolist() == [False, False, True]


def test_separate_trees_fill_parts_without_repeating_anything() -> None:
    parts = split_forest(pack_forest([[i] * 3 for i in range(100)]), 10)
    assert sum(part.num_nodes for part in parts) == 300
    assert len(parts) == 34


def test_refusals() -> None:
    forest = pack_forest([[1, 2], [1, 2, 3, 4]])
    with pytest.raises(ValueError, match=r"rollout 1 has 4 tokens.*at least 4"):
        split_forest(forest, 3)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        split_forest(forest, 0)
    assert split_forest(pack_forest([]), 5) == []
    assert split_forest(pack_forest([[], []]), 5) == []
