"""The backends that need a GPU, as far as they run without one: masks, gathers, refusals."""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_kernels import PackedForest, tree_attention
from mosaic_kernels.attention import tiles
from mosaic_kernels.attention.flash import build_gather, flash_tree_attention
from mosaic_kernels.attention.flex import flex_tree_attention
from mosaic_kernels.attention.reference import reference_tree_attention
from mosaic_kernels.attention.tiles import HALF, tiles_for
from tests.kernels.strategies import Heads, forests, seeds


def varlen_in_plain_pytorch(
    q: torch.Tensor,  # [Uq, Hq, D]
    k: torch.Tensor,  # [G, Hkv, D]
    v: torch.Tensor,  # [G, Hkv, D]
    cu_queries: torch.Tensor,  # [S+1]
    cu_keys: torch.Tensor,  # [S+1]
    longest_queries: int,
    longest_keys: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
) -> torch.Tensor:
    """What flash-attn's documentation says of flash_attn_varlen_func: causal, aligned at the bottom right."""
    assert causal
    assert deterministic
    assert q.shape[2] == k.shape[2] == v.shape[2]  # it knows one head size
    assert longest_queries == int(cu_queries.diff().max())
    assert longest_keys == int(cu_keys.diff().max())
    group, outs = q.shape[1] // k.shape[1], []
    for q0, q1, k0, k1 in zip(cu_queries, cu_queries[1:], cu_keys, cu_keys[1:], strict=False):
        queries, keys, values = q[q0:q1].float(), k[k0:k1].float(), v[k0:k1].float()
        scores = torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(group, 1)) * softmax_scale
        scores = (scores / softcap).tanh() * softcap if softcap else scores
        last = torch.arange(len(queries))[:, None] + len(keys) - len(queries)  # the key at a query's place
        key = torch.arange(len(keys))[None, :]
        hidden = key > last
        if window_size[0] >= 0:
            hidden |= key < last - window_size[0]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1)))
    return torch.cat(outs).to(q.dtype)


bends = st.sampled_from(
    [
        {"window": window, "chunk": chunk, "softcap": softcap}
        for window, chunk in ((None, None), (1, None), (5, None), (None, 4))
        for softcap in (None, 1.5)
    ]
)


def asked(forest: PackedForest, seed: int, share: float) -> np.ndarray | None:
    if share == 1.0:
        return None
    rows = np.flatnonzero(np.random.default_rng(seed).random(forest.num_nodes) < share)
    return rows if len(rows) else np.array([0])


@settings(max_examples=60)
@given(
    forest=forests(min_rollouts=1, max_rollouts=10).filter(lambda one: one.num_nodes > 0),
    seed=seeds,
    bends=bends,
    share=st.sampled_from([1.0, 0.4]),
    value_dim=st.sampled_from([4, 8, 12]),
)
def test_gathered_paths_are_the_tree(
    forest: PackedForest, seed: int, bends: dict[str, Any], share: float, value_dim: int
) -> None:
    fake = ModuleType("flash_attn")
    fake.flash_attn_varlen_func = varlen_in_plain_pytorch  # pyrefly: ignore [missing-attribute]
    fake.__spec__ = __spec__
    rows = asked(forest, seed, share)
    q, k, v = (x.detach() for x in Heads(4, 2, 8, value_dim).draw_qkv(forest.num_nodes, seed, torch.float16))
    q = q if rows is None else q[rows]
    queries = None if rows is None else torch.from_numpy(rows)
    end, depth = torch.from_numpy(forest.subtree_end), torch.from_numpy(forest.positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", fake)
        out = flash_tree_attention(q, k, v, end, positions=depth, scale=0.3, queries=queries, **bends)
    expected = reference_tree_attention(q, k, v, end, positions=depth, scale=0.3, queries=queries, **bends)
    assert torch.allclose(out, expected, atol=2e-3)


def test_a_chain_is_gathered_once() -> None:
    gather = build_gather(np.full(5, 5), np.arange(5), torch.device("cpu"))
    assert gather.keys.tolist() == [0, 1, 2, 3, 4]
    assert (gather.longest_queries, gather.longest_keys) == (5, 5)


@settings(max_examples=20)
@given(
    forest=forests(min_rollouts=1, max_rollouts=10, max_length=60).filter(lambda one: one.num_nodes > 0),
    seed=seeds,
    bends=bends,
    share=st.sampled_from([1.0, 0.4]),
    shape=st.sampled_from([Heads(4, 2, 16), Heads(4, 2, 16, value_dim=8, sinks=True)]),
)
def test_flex_masks_are_the_tree(
    forest: PackedForest, seed: int, bends: dict[str, Any], share: float, shape: Heads
) -> None:
    """Eager FlexAttention applies the mask; it has no backward on CPU."""
    rows = asked(forest, seed, share)
    q, k, v, *sinks = (x.detach() for x in shape.draw(forest.num_nodes, seed, torch.float32))
    q = q if rows is None else q[rows]
    queries = None if rows is None else torch.from_numpy(rows)
    end, depth = torch.from_numpy(forest.subtree_end), torch.from_numpy(forest.positions)
    options: dict[str, Any] = {
        "positions": depth,
        "scale": 0.3,
        "queries": queries,
        "sinks": sinks[0] if sinks else None,
    }
    options |= bends
    out = flex_tree_attention(q, k, v, end, **options)
    assert torch.allclose(out, reference_tree_attention(q, k, v, end, **options), atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "flash", "flex"])
def test_refused_on_cpu_by_name(backend: str) -> None:
    q, k, v = Heads(2, 1, 8).draw_qkv(3, 0)
    with pytest.raises(ValueError, match=rf"{backend}.*does not run on cpu.*'reference', 'segments'"):
        tree_attention(q, k, v, np.array([3, 3, 3]), backend=backend)


def test_a_missing_package_is_named() -> None:
    x = torch.zeros(1, 1, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"flash-attn .*is not installed"):
        flash_tree_attention(x, x, x, torch.tensor([1]), positions=None, window=None, scale=1.0)


def test_sinks_are_refused_by_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("flash_attn")
    fake.__spec__ = __spec__
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    x, end = torch.zeros(1, 1, 8, dtype=torch.float16), torch.tensor([1])
    with pytest.raises(ValueError, match=r"'flash' has no sinks.*'triton', 'flex' or 'reference'"):
        flash_tree_attention(x, x, x, end, positions=None, window=None, scale=1.0, sinks=torch.zeros(1))


def test_a_head_size_takes_the_next_larger_tile() -> None:
    assert tiles_for("sm_80", 80, torch.bfloat16) == HALF["sm_80", 96]
    assert tiles_for("sm_90", 192, torch.bfloat16) == HALF["sm_90", 256]


def test_an_older_triton_gets_tiles_that_do_not_spill_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for version, block_k in (("3.6.0", 64), ("3.7.1", 128), ("3.10.0", 128)):
        monkeypatch.setattr("triton.__version__", version)
        tiles._triton_is_before_3_7.cache_clear()
        assert tiles_for("sm_90", 128, torch.bfloat16).forward.block_k == block_k
    monkeypatch.undo()
    tiles._triton_is_before_3_7.cache_clear()


def test_a_head_size_without_a_tile_is_refused() -> None:
    """The message says which sizes there are, and who else can."""
    assert {(arch, head) for arch in ("sm_80", "sm_90", "sm_100") for head in (64, 96, 128)} <= set(HALF)
    for arch, head, dtype in (
        ("sm_90", 1024, torch.bfloat16),
        ("sm_75", 64, torch.float16),
        ("sm_90", 256, torch.float32),
    ):
        with pytest.raises(
            ValueError, match=rf"head size {head} in {dtype} on {arch}.*'flash', 'flex' or 'ref"
        ):
            tiles_for(arch, head, dtype)
