"""tree_attention against each rollout alone, and what its plans cover."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import PackedForest, pack_forest, tree_attention
from mosaic_kernels.attention import capped
from mosaic_kernels.attention import plan as known_plans
from mosaic_kernels.attention.capped import MAX_SCORES
from mosaic_kernels.attention.plan import build_plan, plan_for
from mosaic_kernels.attention.segments import segments_tree_attention
from tests.kernels.attention_for_tests import BIG, Bends, big_forest, check
from tests.kernels.strategies import Heads, forests, heads, seeds

windows = st.sampled_from([None, None, 1, 3, 10])
all_bends = st.sampled_from([Bends(), Bends(softcap=1.5), Bends(chunk=4), Bends(chunk=1, softcap=0.5)])
scales = st.sampled_from([None, None, 0.3, 2.0])


@pytest.mark.parametrize("backend", ["reference", "segments"])
@settings(max_examples=60)
@given(forest=forests(), shape=heads, seed=seeds, window=windows, scale=scales, bends=all_bends)
def test_equals_each_rollout_alone(
    backend: str, forest: PackedForest, shape: Heads, seed: int, window: int | None, scale: float | None,
    bends: Bends,
) -> None:  # fmt: skip
    qkv = shape.draw(forest.num_nodes, seed)
    window = None if "chunk" in bends else window

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        return tree_attention(
            q, k, v, forest.subtree_end, positions=forest.positions, window=window, scale=scale,
            sinks=sinks, backend=backend, **bends,
        )  # fmt: skip

    check(forest, qkv, attention, seed, window, scale, bends=bends)


@settings(max_examples=120)
@given(
    forest=forests(max_rollouts=10),
    shape=heads,
    seed=seeds,
    window=windows,
    block=st.sampled_from([1, 3, 8]),
    trunk=st.sampled_from([1, 2, 5, 12, 10**9]),
    square=st.sampled_from([1, 4, 100]),
    stacked=st.sampled_from([1, 4, 100]),
    bends=all_bends,
    scores=st.sampled_from([1, 64, MAX_SCORES]),
)
def test_every_cover_is_exact(
    forest: PackedForest,
    shape: Heads,
    seed: int,
    window: int | None,
    block: int,
    trunk: int,
    square: int,
    stacked: int,
    bends: Bends,
    scores: int,
) -> None:
    """Small sizes: squares, rectangles, contexts, stacks and buckets all occur on small forests."""
    chunk, softcap = bends.get("chunk"), bends.get("softcap")
    window = window if chunk is None else None
    plan = build_plan(
        forest.subtree_end, forest.positions, window,
        chunk=chunk, block=block, trunk=trunk, square=square, stacked=stacked,
    )  # fmt: skip

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        return segments_tree_attention(
            q, k, v, plan, scale=shape.head_dim**-0.5, softcap=softcap, sinks=sinks
        )

    qkv = shape.draw(forest.num_nodes, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capped, "MAX_SCORES", scores)
        check(forest, qkv, attention, seed, window, bends=bends)


def some_nodes(forest: PackedForest, seed: int, kind: str) -> np.ndarray:
    """Rising positions: the last ones (a held prefix), scattered ones, runs of ones, none."""
    rng, count = np.random.default_rng(seed), forest.num_nodes
    if kind == "last":
        return np.arange(int(rng.integers(count + 1)), count)
    if kind == "runs":
        return np.flatnonzero(np.repeat(rng.random(count) < 0.5, rng.integers(1, 9, count))[:count])
    return np.flatnonzero(rng.random(count) < {"scattered": 0.3, "none": 0.0}[kind])


some = st.sampled_from(["last", "scattered", "runs", "none"])


@pytest.mark.parametrize("backend", ["reference", "segments", "small cover"])
@settings(max_examples=60)
@given(forest=forests(max_rollouts=10), shape=heads, seed=seeds, window=windows, kind=some, bends=all_bends)
def test_some_queries_equal_their_rows_of_all(
    backend: str, forest: PackedForest, shape: Heads, seed: int, window: int | None, kind: str, bends: Bends
) -> None:
    """Outputs of the rows asked for, and their gradients in every key, are those of the whole forest."""
    window = None if "chunk" in bends else window
    queries = some_nodes(forest, seed, kind)
    rows = torch.from_numpy(queries)
    end, positions = forest.subtree_end, forest.positions

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        if backend != "small cover":
            return tree_attention(
                q[rows], k, v, end, queries=queries, positions=positions, window=window, sinks=sinks,
                backend=backend, **bends,
            )  # fmt: skip
        plan = build_plan(
            end,
            positions,
            window,
            queries,
            block=1 + seed % 5,
            trunk=1 + seed % 7,
            chunk=bends.get("chunk"),
            square=1 + seed % 3,
            stacked=1 + seed % 4,
        )
        softcap = bends.get("softcap")
        return segments_tree_attention(
            q[rows], k, v, plan, scale=shape.head_dim**-0.5, softcap=softcap, sinks=sinks
        )

    qkv = shape.draw(forest.num_nodes, seed)
    check(forest, qkv, attention, seed, window, queries=queries, bends=bends)


@pytest.mark.parametrize(
    ("shared", "rollouts", "trunks"), [(40, 32, 1), (20, 32, 0), (40, 2, 0), (130, 2, 1)]
)
def test_a_prompt_is_a_trunk_where_enough_descends_from_it(shared: int, rollouts: int, trunks: int) -> None:
    """By its length, or by its length times its descendants; and the result stays exact."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 99, shared)
    forest = pack_forest([np.append(prompt, [100 + r, *rng.integers(0, 99, 9)]) for r in range(rollouts)])
    plan = build_plan(forest.subtree_end)
    assert len(plan.squares) == len(plan.rectangles) == trunks
    q, k, v = Heads(2, 1, 8).draw_qkv(forest.num_nodes, 0)
    got = segments_tree_attention(q, k, v, plan, scale=8**-0.5)
    expected = tree_attention(q, k, v, forest.subtree_end, backend="reference")
    assert float((got - expected).detach().abs().max()) <= 1e-12


@settings(max_examples=100)
@given(
    forest=forests(max_rollouts=10),
    block=st.integers(1, 9),
    trunk=st.integers(1, 12),
    square=st.sampled_from([1, 3, 100]),
    stacked=st.sampled_from([1, 4, 100]),
    kind=st.sampled_from(["all", "last", "scattered", "runs"]),
    seed=seeds,
)
def test_a_plan_covers_each_visible_pair_once(
    forest: PackedForest, block: int, trunk: int, square: int, stacked: int, kind: str, seed: int
) -> None:
    """No (query, key) pair may be counted twice: merging would weigh it double."""
    asked = np.arange(forest.num_nodes) if kind == "all" else some_nodes(forest, seed, kind)
    covered = np.zeros((len(asked), forest.num_nodes), np.int64)
    plan = build_plan(
        forest.subtree_end,
        queries=None if kind == "all" else asked,
        block=block,
        trunk=trunk,
        square=square,
        stacked=stacked,
    )
    for one in plan.squares:
        covered[one.rows, one.keys] += np.tri(one.rows.stop - one.rows.start, dtype=int)
    for one in plan.rectangles:
        covered[one.rows, one.keys] += 1
    for context in plan.contexts:
        covered[context.rows, context.keys.numpy()] += 1
    for stack in plan.stacks:
        rows, keys = np.arange(len(asked))[stack.rows], np.arange(forest.num_nodes)[stack.keys]
        real = np.arange(len(rows)) if stack.real is None else stack.real.numpy()
        of_square = real * stack.squares // len(rows)
        rows, keys = rows[real], keys[real]
        same = of_square[:, None] == of_square[None, :]
        covered[np.ix_(rows, keys)] += same & (real[:, None] >= real[None, :])
    for bucket in plan.buckets:
        queries, keys = bucket.queries.view(bucket.blocks, -1), bucket.keys.view(bucket.blocks, -1)
        for rows, columns, hidden in zip(queries, keys, bucket.hidden[:, 0], strict=True):
            np.add.at(covered, (rows.numpy()[:, None], columns.numpy()[None, :]), ~hidden.numpy())
    node = np.arange(forest.num_nodes)
    visible = (node[None, :] <= asked[:, None]) & (asked[:, None] < forest.subtree_end[None, :])
    assert (covered == visible).all()


def test_branches_of_equal_length_are_one_call_without_copies() -> None:
    """However long, up to a square's size; one of another length is a call of its own."""
    prompt = list(range(200))
    equal = [prompt + [1000 * branch + node for node in range(150)] for branch in range(1, 4)]
    plan = build_plan(pack_forest(equal).subtree_end)
    (stack,) = plan.stacks
    assert (stack.rows, stack.keys, stack.squares) == (slice(200, 650), slice(200, 650), 3)
    assert [one.rows for one in plan.squares] == [slice(0, 200)]
    plan = build_plan(pack_forest([*equal, prompt + [9000 + node for node in range(140)]]).subtree_end)
    assert [one.squares for one in plan.stacks] == [3]
    assert [one.rows.stop - one.rows.start for one in plan.squares] == [200, 140]


@pytest.mark.parametrize("kind", BIG)
@pytest.mark.parametrize("window", [None, 50])
def test_shipped_sizes(kind: str, window: int | None) -> None:
    forest = big_forest(kind)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tree_attention(q, k, v, forest.subtree_end, positions=forest.positions, window=window)

    check(forest, Heads(4, 2, 16).draw_qkv(forest.num_nodes, 0), attention, 1, window)


@pytest.mark.parametrize("kind", BIG)
def test_shipped_sizes_in_fp32(kind: str) -> None:
    forest = big_forest(kind)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tree_attention(q, k, v, forest.subtree_end)

    check(forest, Heads(4, 2, 16).draw_qkv(forest.num_nodes, 0, torch.float32), attention, 1)


def test_the_same_call_gives_the_same_bits() -> None:
    forest = big_forest("trunk, fork, long branches")
    qkv = Heads(4, 2, 16).draw_qkv(forest.num_nodes, 0, torch.float32)
    first, second = (
        torch.autograd.grad(tree_attention(*qkv, forest.subtree_end).sum(), qkv) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_plan_follows_its_content_not_its_object() -> None:
    """The cache of plans must not serve an array that was changed in place."""
    q, k, v = Heads(1, 1, 4).draw_qkv(3, 0)
    end = np.array([3, 3, 3])
    chain = tree_attention(q, k, v, end)
    end[:] = [1, 2, 3]
    assert torch.equal(tree_attention(q, k, v, end), v)
    assert not torch.equal(chain, v)
    tensor = torch.tensor([3, 3, 3])
    torch.testing.assert_close(tree_attention(q, k, v, tensor), chain)
    tensor.copy_(torch.tensor([1, 2, 3]))
    assert torch.equal(tree_attention(q, k, v, tensor), v)


def test_a_plan_lives_as_long_as_its_forest() -> None:
    """A schedule of many parts makes each part's plans once, however many parts there are."""
    ends = [torch.from_numpy(pack_forest([[1] * 9, [1] * n + [2]]).subtree_end) for n in range(1, 9)] * 2
    some = torch.tensor([1, 4])
    plans = [[plan_for(end, None, None, rows) for rows in (None, some)] for end in ends + ends]
    assert len({id(plan) for pair in plans for plan in pair}) == 16
    end = ends.pop()
    known = len(known_plans._PLANS)
    ends.clear()
    assert len(known_plans._PLANS) == known - 7
    assert plan_for(end, None, None) is plans[-1][0]
