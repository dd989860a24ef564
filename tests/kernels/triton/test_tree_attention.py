"""The attention kernels against each rollout alone, on random forests."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mosaic_kernels import PackedForest, pack_forest, tree_attention
from mosaic_kernels.attention.blocks import tree_for
from mosaic_kernels.attention.tiles import Tile, Tiles
from mosaic_kernels.attention.triton import attend
from mosaic_kernels.forest.layout import IntArray
from tests.kernels.attention_for_tests import Bends
from tests.kernels.attention_for_tests import check as check_attention
from tests.kernels.strategies import Heads, forests, seeds
from tests.kernels.triton.machine import machine

heads = st.sampled_from(
    [
        Heads(2, 1, 32),
        Heads(1, 1, 64),
        Heads(3, 3, 32, sinks=True),
        Heads(4, 2, 32, value_dim=16),
        Heads(1, 1, 96, value_dim=64, sinks=True),
    ]
)
windows = st.sampled_from([None, None, 1, 3, 10])
all_bends = st.sampled_from(
    [Bends(), Bends(), Bends(softcap=1.5), Bends(chunk=4), Bends(chunk=7, softcap=3.0)]
)
dtypes = st.sampled_from(machine().dtypes)


def check(
    forest: PackedForest,
    qkv: list[torch.Tensor],  # in the dtype to test
    *,
    seed: int = 0,
    window: int | None = None,
    scale: float | None = None,
    queries: IntArray | None = None,
    bends: Bends | None = None,
) -> None:
    """Output and gradients of the kernels are the fp64 oracle's, as far as rounding leaves them."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        return tree_attention(
            q if queries is None else q[torch.from_numpy(queries).to(q.device)], k, v, forest.subtree_end,
            queries=queries, positions=forest.positions, window=window, scale=scale, sinks=sinks,
            backend="triton", **(bends or {}),
        )  # fmt: skip

    leaves = [x.detach().to(machine().device, copy=True).requires_grad_() for x in qkv]
    check_attention(forest, leaves, attention, seed, window, scale, queries, bends)


@settings(max_examples=machine().examples)
@given(
    forest=forests(max_rollouts=6, max_length=machine().max_length),
    shape=heads,
    seed=seeds,
    window=windows,
    dtype=dtypes,
    scale=st.sampled_from([None, 0.5]),
    bends=all_bends,
)
@example(  # a tree ends within a block of queries: the blocks of its keys are seen by the first of them alone
    forest=pack_forest([np.arange(40), np.arange(100, 160)]),
    shape=Heads(4, 2, 32),
    seed=0,
    window=None,
    dtype=torch.float32,
    scale=None,
    bends=Bends(),
)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_each_rollout_alone(
    forest: PackedForest, shape: Heads, seed: int, window: int | None, dtype: torch.dtype,
    scale: float | None, bends: Bends,
) -> None:  # fmt: skip
    qkv = shape.draw(forest.num_nodes, seed, dtype)
    window = None if "chunk" in bends else window
    check(forest, qkv, seed=seed, window=window, scale=scale, bends=bends)


@settings(max_examples=machine().examples // 2)
@given(
    forest=forests(min_rollouts=1, max_rollouts=6, max_length=machine().max_length),
    seed=seeds,
    window=windows,
    dtype=dtypes,
)
@pytest.mark.usefixtures("poisoned_memory")
def test_some_queries_see_all_keys(
    forest: PackedForest, seed: int, window: int | None, dtype: torch.dtype
) -> None:
    """Gaps between queries: a block of rows spans many blocks of keys, and some keys nobody asks."""
    rng = np.random.default_rng(seed)
    queries = np.flatnonzero(rng.random(forest.num_nodes) < 0.3)
    check(
        forest,
        list(Heads(4, 2, 32).draw_qkv(forest.num_nodes, seed, dtype)),
        seed=seed,
        window=window,
        queries=queries,
    )


def awkward_forest() -> PackedForest:
    """Several trees, forks, one-token trees between long ones: full, partial, unvisited and tail blocks."""
    rng = np.random.default_rng(5)
    trunk = rng.integers(99, size=70).tolist()
    forest = pack_forest(
        [
            [7],
            trunk + [1] * 40,
            trunk + [2] * 9,
            [3],
            trunk[:50] + [4] * 33,
            rng.integers(99, size=34).tolist(),
            [5],
        ]
    )
    assert forest.num_nodes % 16
    return forest


def small_forest() -> PackedForest:
    """The same in a few blocks, for tests that run it many times."""
    trunk = list(range(20))
    forest = pack_forest([[7], [*trunk, *[1] * 13], [*trunk, *[2] * 5], [3], [*trunk[:9], *[4] * 11]])
    assert forest.num_nodes % 16
    return forest


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256, *([512] if machine().name == "device" else [])])
@pytest.mark.parametrize("dtype", machine().dtypes, ids=str)
def test_every_head_size(head_dim: int, dtype: torch.dtype) -> None:
    if machine().name == "device" and head_dim >= 256 and dtype == torch.float32:
        pytest.skip("no tile holds such fp32 heads: see test_attention_backends.py for the refusal")
    # Emulated, a large forest takes long.
    large = machine().name == "device" or (head_dim, dtype) in ((32, torch.float32), (128, torch.float16))
    forest, window = (awkward_forest(), 45) if large else (small_forest(), 15)
    check(forest, list(Heads(2, 1, head_dim).draw_qkv(forest.num_nodes, 0, dtype)), window=window)


def test_all_that_bends_attention_at_once() -> None:
    """A chunk ends within a block of queries, whose first ones see all of the keys before it."""
    forest = pack_forest([np.arange(70), [*range(50), 99, 98]])
    qkv = Heads(2, 1, 48, value_dim=24, sinks=True).draw(forest.num_nodes, 0, torch.float32)
    check(forest, qkv, bends=Bends(chunk=40, softcap=2.0))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_forests(count: int) -> None:
    """No tokens, one token, two trees of one token."""
    forest = pack_forest([[index] for index in range(count)])
    check(forest, Heads(2, 1, 32, sinks=True).draw(forest.num_nodes, 0, torch.float32))


def test_extreme_scores() -> None:
    """Scores of hundreds in both directions: one key takes all, nothing overflows."""
    forest = awkward_forest()
    q, k, v = (x.detach() for x in Heads(2, 1, 32).draw_qkv(forest.num_nodes, 0, torch.float32))
    check(forest, [(q * 10).requires_grad_(), (k * 10).requires_grad_(), v.requires_grad_()])


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_all_scores_far_from_zero(sign: float) -> None:
    """A hidden key loaded as zeros scores 0: far above, or far below, every visible one."""
    forest = awkward_forest()
    q, k, v = (x.detach() for x in Heads(1, 1, 32).draw_qkv(forest.num_nodes, 0, torch.float32))
    q, k = q.abs() * 3, k.abs() * 3 * sign
    check(forest, [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()])


@pytest.mark.parametrize("off", [(0,), (1,), (2,), (1, 2)])
def test_gradients_switched_off(off: tuple[int, ...]) -> None:
    forest = small_forest()
    device = machine().device
    qkv = [x.detach().to(device) for x in Heads(2, 1, 32).draw_qkv(forest.num_nodes, 0, torch.float32)]
    gradients = []
    for wanted in ((0, 1, 2), tuple({0, 1, 2} - set(off))):
        leaves = [x.clone().requires_grad_(index in wanted) for index, x in enumerate(qkv)]
        tree_attention(*leaves, subtree_end=forest.subtree_end, backend="triton").sin().sum().backward()
        gradients.append([x.grad for x in leaves])
    for index, (full, part) in enumerate(zip(*gradients, strict=True)):
        assert full is not None
        assert (part is None) if index in off else (part is not None and torch.equal(full, part))


def test_any_layout_of_inputs_and_gradient() -> None:
    """Strided last dimension, heads first, a slice of a fused projection, an address off by 4 bytes."""
    forest, device = small_forest(), machine().device
    count = forest.num_nodes
    plain = [x.detach().to(device) for x in Heads(2, 2, 32).draw_qkv(count, 0, torch.float32)]
    fused = torch.cat([x.reshape(count, -1) for x in plain], 1).split(64, 1)
    shifted = torch.zeros(plain[2].numel() + 1, device=device)[1:].view(plain[2].shape).copy_(plain[2])
    layouts = [
        [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in plain],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain],
        [x.view(count, 2, 32) for x in fused],
        [plain[0], plain[1], shifted],
    ]
    results = []
    for layout in [plain, *layouts]:
        leaves = [x.detach().requires_grad_() for x in layout]
        out = tree_attention(*leaves, subtree_end=forest.subtree_end, backend="triton")
        weight = torch.linspace(-1, 1, out.numel(), device=device).view(32, 2, count).permute(2, 1, 0)
        results.append([out, *torch.autograd.grad(out, leaves, weight)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_same_call_gives_the_same_bits() -> None:
    forest = small_forest()
    runs = []
    for _ in range(2):
        leaves = [
            x.detach().to(machine().device).requires_grad_()
            for x in Heads(4, 2, 32).draw_qkv(forest.num_nodes, 0, torch.float16)
        ]
        out = tree_attention(*leaves, subtree_end=forest.subtree_end, backend="triton")
        runs.append([out, *torch.autograd.grad(out.float().sin().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_negative_scale() -> None:
    """The largest product is then the smallest score, which as a maximum would overflow."""
    forest = pack_forest([np.arange(70)])
    check(forest, Heads(1, 1, 32).draw(forest.num_nodes, 0, torch.float32), scale=-6.0)


def test_keys_and_values_in_passes_of_their_own_get_the_same_gradient() -> None:
    """As tiles of large heads make them; bit for bit."""
    forest = small_forest()
    qkv = [
        x.detach().to(machine().device) for x in Heads(4, 2, 32).draw_qkv(forest.num_nodes, 0, torch.float32)
    ]
    tree = tree_for(torch.from_numpy(forest.subtree_end).to(machine().device), None, None, None)
    tiles = Tiles(Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2))
    gradients = []
    for apart in (False, True):
        leaves = [x.clone().requires_grad_() for x in qkv]
        attend(*leaves, tree=tree, scale=0.2, tiles=replace(tiles, apart=apart)).sin().sum().backward()
        gradients.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
