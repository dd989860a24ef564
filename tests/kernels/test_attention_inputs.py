"""tree_attention on awkward inputs: extreme, strided, empty, gradients switched off; and what it refuses."""

import numpy as np
import pytest
import torch

from mosaic_kernels import pack_forest, tree_attention
from mosaic_kernels.attention.plan import build_plan
from mosaic_kernels.attention.segments import segments_tree_attention
from tests.kernels.attention_for_tests import BIG, big_forest, check
from tests.kernels.criterion import relative_error
from tests.kernels.strategies import Heads


@pytest.mark.parametrize("backend", ["reference", "segments"])
def test_extreme_logits(backend: str) -> None:
    """Scores of 1e4 leave one key of weight one; nothing overflows, in parts that hold the key or not."""
    forest = big_forest("trunk, fork, long branches")
    q, k, v = (x.detach() for x in Heads(2, 2, 8).draw_qkv(forest.num_nodes, 0))
    qkv = (q * 100).requires_grad_(), (k * 100).requires_grad_(), v.requires_grad_()

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tree_attention(q, k, v, forest.subtree_end, backend=backend)

    check(forest, qkv, attention, seed=1)


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
    check(forest, (q, k, v), attention, seed=1)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("backend", ["reference", "segments"])
def test_gradcheck(backend: str, softcap: float | None) -> None:
    forest = pack_forest([[1, 2, 3], [1, 2, 4], [5], [1, 2]])
    plan = build_plan(forest.subtree_end, block=2, trunk=2)
    leaves = Heads(2, 1, 3, value_dim=2, sinks=True).draw(forest.num_nodes, 0)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        if backend == "segments":
            return segments_tree_attention(q, k, v, plan, scale=0.5, softcap=softcap, sinks=sinks)
        end = forest.subtree_end
        return tree_attention(q, k, v, end, softcap=softcap, sinks=sinks, backend=backend)

    assert torch.autograd.gradcheck(attention, leaves)


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
    with pytest.raises(ValueError, match="chunk needs positions"):
        tree_attention(q, k, v, end, chunk=2)
    with pytest.raises(ValueError, match="a window or a chunk, not both"):
        tree_attention(q, k, v, end, window=2, chunk=2, positions=end)
    with pytest.raises(ValueError, match="softcap must be above 0"):
        tree_attention(q, k, v, end, softcap=0.0)
    with pytest.raises(ValueError, match=r"sinks must be \[4\] on cpu, got \[3\]"):
        tree_attention(q, k, v, end, sinks=torch.zeros(3))
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
