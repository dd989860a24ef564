"""tree_attention against each rollout alone."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import PackedForest, pack_forest, tree_attention
from mosaic_kernels.attention import plan as plan_module
from mosaic_kernels.attention.plan import build_plan, plan_for
from mosaic_kernels.attention.segments import segments_tree_attention
from mosaic_kernels.oracle import attention_of_rollouts, errors_of, relative_error
from tests.kernels.strategies import Heads, forests, heads, seeds

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def errors(
    forest: PackedForest,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention: Attention,
    seed: int,
    window: int | None,
    scale: float | None,
) -> list[float]:
    """Relative errors of the output and of the gradients of q, k and v against the fp64 oracle.

    Each rollout token weights its output by itself, so a shared node collects the gradients of all.
    """
    nodes = torch.from_numpy(forest.node_index)
    exact = q, k, v = [x.detach().double().requires_grad_() for x in qkv]
    expected = attention_of_rollouts(q, k, v, forest, window=window, scale=scale)
    return errors_of([attention(*qkv)[nodes]], qkv, [expected], exact, seed)


windows = st.sampled_from([None, None, 1, 3, 10])
scales = st.sampled_from([None, None, 0.3, 2.0])


@pytest.mark.parametrize("backend", ["reference", "segments"])
@settings(max_examples=60)
@given(forest=forests(), shape=heads, seed=seeds, window=windows, scale=scales)
def test_equals_each_rollout_alone(
    backend: str, forest: PackedForest, shape: Heads, seed: int, window: int | None, scale: float | None
) -> None:
    qkv = shape.draw_qkv(forest.num_nodes, seed)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tree_attention(
            q,
            k,
            v,
            forest.subtree_end,
            positions=forest.positions,
            window=window,
            scale=scale,
            backend=backend,
        )

    assert max(errors(forest, qkv, attention, seed, window, scale)) <= 1e-12


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
) -> None:
    """Small sizes: squares, rectangles, contexts, stacks and buckets all occur on small forests."""
    plan = build_plan(
        forest.subtree_end, forest.positions, window,
        block=block, trunk=trunk, square=square, stacked=stacked,
    )  # fmt: skip

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return segments_tree_attention(q, k, v, plan, scale=shape.head_dim**-0.5)

    qkv = shape.draw_qkv(forest.num_nodes, seed)
    assert max(errors(forest, qkv, attention, seed, window, None)) <= 1e-12


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
@given(forest=forests(max_rollouts=10), shape=heads, seed=seeds, window=windows, kind=some)
def test_some_queries_equal_their_rows_of_all(
    backend: str, forest: PackedForest, shape: Heads, seed: int, window: int | None, kind: str
) -> None:
    """Outputs of the rows asked for, and their gradients in every key, are those of the whole forest."""
    queries = some_nodes(forest, seed, kind)
    rows = torch.from_numpy(queries)
    qkv = shape.draw_qkv(forest.num_nodes, seed)
    exact = q, k, v = [x.detach().requires_grad_() for x in qkv]
    end, positions = forest.subtree_end, forest.positions
    expected = tree_attention(q, k, v, end, positions=positions, window=window, backend="reference")[rows]
    q, k, v = qkv
    if backend == "small cover":
        plan = build_plan(
            end,
            positions,
            window,
            queries,
            block=1 + seed % 5,
            trunk=1 + seed % 7,
            square=1 + seed % 3,
            stacked=1 + seed % 4,
        )
        got = segments_tree_attention(q[rows], k, v, plan, scale=shape.head_dim**-0.5)
    else:
        got = tree_attention(
            q[rows], k, v, end, queries=queries, positions=positions, window=window, backend=backend
        )
    assert max(errors_of([got], qkv, [expected], exact, seed)) <= 1e-12


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
        real = np.arange(len(stack.rows)) if stack.real is None else stack.real.numpy()
        rows, keys = stack.rows.numpy()[real], stack.keys.numpy()[real]
        of_square = real * stack.squares // len(stack.rows)
        same = of_square[:, None] == of_square[None, :]
        covered[np.ix_(rows, keys)] += same & (real[:, None] >= real[None, :])
    for bucket in plan.buckets:
        queries, keys = bucket.queries.view(bucket.blocks, -1), bucket.keys.view(bucket.blocks, -1)
        for rows, columns, hidden in zip(queries, keys, bucket.hidden[:, 0], strict=True):
            np.add.at(covered, (rows.numpy()[:, None], columns.numpy()[None, :]), ~hidden.numpy())
    node = np.arange(forest.num_nodes)
    visible = (node[None, :] <= asked[:, None]) & (asked[:, None] < forest.subtree_end[None, :])
    assert (covered == visible).all()


def big_forest(kind: str) -> PackedForest:
    """Forests that reach the shipped block and trunk sizes."""
    rng = np.random.default_rng(3)

    def draw(n: int) -> list[int]:
        return rng.integers(1000, size=n).tolist()

    trunk, step = draw(170), draw(60)
    return pack_forest(
        {
            "trunk, fork, long branches": [
                trunk + step + draw(140),
                trunk + step + draw(30),
                trunk + draw(20),
            ],
            "short prompt, long branches": [step + draw(150), step + draw(131), step[:10] + draw(9), draw(1)],
            "nothing shared": [draw(129), draw(129), draw(40)],
            "similar branches": [trunk + draw(n) for n in (60, 57, 52, 31)] + [draw(58), draw(59)],
            "many short": [draw(int(rng.integers(1, 9))) for _ in range(150)],
        }[kind]
    )


BIG = [
    "trunk, fork, long branches",
    "short prompt, long branches",
    "nothing shared",
    "similar branches",
    "many short",
]


@pytest.mark.parametrize("kind", BIG)
@pytest.mark.parametrize("window", [None, 50])
def test_shipped_sizes(kind: str, window: int | None) -> None:
    forest = big_forest(kind)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tree_attention(q, k, v, forest.subtree_end, positions=forest.positions, window=window)

    assert (
        max(errors(forest, Heads(4, 2, 16).draw_qkv(forest.num_nodes, 0), attention, 1, window, None))
        <= 1e-12
    )


@pytest.mark.parametrize("kind", BIG)
def test_fp32_is_as_good_as_plain_pytorch(kind: str) -> None:
    forest = big_forest(kind)
    qkv = Heads(4, 2, 16).draw_qkv(forest.num_nodes, 0, torch.float32)

    def with_backend(backend: str) -> Attention:
        return lambda q, k, v: tree_attention(q, k, v, forest.subtree_end, backend=backend)

    plain, ours = (errors(forest, qkv, with_backend(b), 1, None, None) for b in ("reference", "segments"))
    for factor, theirs, own in zip([2, 3, 3, 3], plain, ours, strict=True):
        assert own <= factor * theirs + 1e-7


@pytest.mark.parametrize("backend", ["reference", "segments"])
def test_extreme_logits(backend: str) -> None:
    """Scores of 1e4 leave one key of weight one; nothing overflows, in parts that hold the key or not."""
    forest = big_forest("trunk, fork, long branches")
    q, k, v = (x.detach() for x in Heads(2, 2, 8).draw_qkv(forest.num_nodes, 0))
    qkv = (q * 100).requires_grad_(), (k * 100).requires_grad_(), v.requires_grad_()

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tree_attention(q, k, v, forest.subtree_end, backend=backend)

    assert (
        max(errors(forest, qkv, attention, 1, None, None)) <= 1e-9
    )  # scores carry an absolute error of 1e-12


@pytest.mark.parametrize("off", [0, 1, 2])
def test_each_gradient_switched_off(off: int) -> None:
    forest = big_forest("short prompt, long branches")
    qkv = Heads(2, 1, 8).draw_qkv(forest.num_nodes, 0)
    full = torch.autograd.grad(tree_attention(*qkv, forest.subtree_end).sin().sum(), qkv)
    qkv[off].requires_grad_(False)
    tree_attention(*qkv, forest.subtree_end).sin().sum().backward()
    for index, (x, expected) in enumerate(zip(qkv, full, strict=True)):
        assert (x.grad is None) == (index == off)
        assert x.grad is None or torch.equal(x.grad, expected)


@pytest.mark.parametrize("backend", ["reference", "segments"])
def test_non_contiguous_input_and_gradient(backend: str) -> None:
    forest = big_forest("trunk, fork, long branches")
    shape = Heads(4, 4, 16)
    # The last dimension is strided, and the incoming gradient is too.
    strided = tuple(
        x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
        for x in shape.draw_qkv(forest.num_nodes, 0)
    )
    assert all(x.stride(-1) != 1 for x in strided)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = tree_attention(q, k, v, forest.subtree_end, backend=backend)
        return out.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    q, k, v = strided
    assert max(errors(forest, (q, k, v), attention, 1, None, None)) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "segments"])
def test_gradcheck(backend: str) -> None:
    forest = pack_forest([[1, 2, 3], [1, 2, 4], [5], [1, 2]])
    plan = build_plan(forest.subtree_end, block=2, trunk=2)
    qkv = Heads(2, 1, 3).draw_qkv(forest.num_nodes, 0)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if backend == "segments":
            return segments_tree_attention(q, k, v, plan, scale=0.5)
        return tree_attention(q, k, v, forest.subtree_end, backend=backend)

    assert torch.autograd.gradcheck(attention, qkv)


@pytest.mark.usefixtures("poisoned_memory")
def test_uninitialised_memory_never_shows() -> None:
    for kind in BIG:
        forest = big_forest(kind)
        qkv = Heads(2, 1, 8).draw_qkv(forest.num_nodes, 0)
        out = tree_attention(*qkv, forest.subtree_end)
        assert all(bool(torch.isfinite(x).all()) for x in (out, *torch.autograd.grad(out.sum(), qkv)))


@pytest.mark.parametrize("backend", ["reference", "segments"])
def test_empty_forest_and_half_precision(backend: str) -> None:
    empty = torch.zeros(0, 2, 4, requires_grad=True)
    out = tree_attention(empty, empty, empty, np.zeros(0, np.int64), backend=backend)
    assert out.shape == (0, 2, 4)
    out.sum().backward()
    forest = pack_forest([[1, 2, 3], [1, 4]])
    q, k, v = Heads(2, 1, 8).draw_qkv(forest.num_nodes, 0, torch.bfloat16)
    out = tree_attention(q, k, v, forest.subtree_end, backend=backend)
    exact = tree_attention(q.double(), k.double(), v.double(), forest.subtree_end)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) <= 2**-8


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
    known = len(plan_module._PLANS)
    ends.clear()
    assert len(plan_module._PLANS) == known - 7
    assert plan_for(end, None, None) is plans[-1][0]


def test_refusals() -> None:
    q, k, v = Heads(4, 2, 8).draw_qkv(3, 0)
    end = np.array([3, 3, 3])
    with pytest.raises(ValueError, match=r"'triton'.*available on cpu are 'auto', 'reference', 'segments'"):
        tree_attention(q, k, v, end, backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        tree_attention(q, k, v, end, backend="fast")
    with pytest.raises(ValueError, match="window needs positions"):
        tree_attention(q, k, v, end, window=2)
    with pytest.raises(ValueError, match="window must be at least 1"):
        tree_attention(q, k, v, end, window=0, positions=end)
    with pytest.raises(ValueError, match=r"subtree_end has shape \(2,\)"):
        tree_attention(q, k, v, end[:2])
    with pytest.raises(ValueError, match=r"subtree_end holds 4, outside \[0, 4\)"):
        tree_attention(q, k, v, end + 1)
    with pytest.raises(ValueError, match="3 key/value heads do not divide 4 query heads"):
        tree_attention(q, k[:, :1].expand(3, 3, 8), v[:, :1].expand(3, 3, 8), end)
    with pytest.raises(ValueError, match="share a floating dtype"):
        tree_attention(q, k.float(), v, end)
    with pytest.raises(ValueError, match=r"q has 2 rows for 3 positions: pass queries="):
        tree_attention(q[:2], k, v, end)
    with pytest.raises(ValueError, match="agree in D"):
        tree_attention(q, k[..., :2], v[..., :2], end)
    with pytest.raises(ValueError, match=r"queries has shape \(2,\), q has 3 rows"):
        tree_attention(q, k, v, end, queries=np.array([0, 1]))
    with pytest.raises(ValueError, match="queries must rise"):
        tree_attention(q, k, v, end, queries=np.array([0, 2, 1]))
    with pytest.raises(ValueError, match=r"queries holds 3, outside \[0, 3\)"):
        tree_attention(q, k, v, end, queries=np.array([0, 1, 3]))
