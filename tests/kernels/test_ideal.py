"""ideal_speedup against a count by hand."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_kernels import ideal_speedup, pack_forest
from tests.kernels.strategies import Rollouts, rollouts

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
}


def count(
    sequences: list[tuple[tuple[int, ...], int]], labelled: int, head_dim: int, windows: list[int | None]
) -> float:
    """Multiply-adds, matrix by matrix; sequences are (prefix, 1) for every token computed."""
    total = 0
    for window in windows:
        for prefix, _ in sequences:
            visible = len(prefix) if window is None else min(len(prefix), window)
            total += 16 * 4 * head_dim + 2 * 16 * 2 * head_dim + 4 * head_dim * 16  # q, k and v, o
            total += 3 * 16 * 24  # gate, up, down
            total += visible * 4 * head_dim * 2  # q k^T and p v
    return total + labelled * 16 * 50


@given(drawn=rollouts(min_rollouts=1), window=st.sampled_from([None, 2, 5]), mixed=st.booleans())
def test_counts_each_matrix(drawn: Rollouts, window: int | None, mixed: bool) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = SimpleNamespace(**SHAPE, head_dim=5, sliding_window=window, layer_types=kinds if mixed else None)
    windows = [None if mixed and kind == "full_attention" else window for kind in kinds]
    flat = [(tuple(s[: t + 1]), 1) for s in drawn.sequences for t in range(len(s))]
    trained = [
        (tuple(s[:t]), 1)
        for s, m in zip(drawn.sequences, drawn.trained, strict=True)
        for t in range(len(s))
        if m[t]
    ]
    expected = 1.0
    if flat:
        expected = count(flat, len(trained), 5, windows) / count(
            list(set(flat)), len(set(trained)), 5, windows
        )
    assert ideal_speedup(drawn.pack(), config) == pytest.approx(expected, rel=1e-12)


def test_head_dim_falls_back_to_hidden_over_heads_and_nothing_shared_is_one() -> None:
    forest = pack_forest([[1, 2, 3], [4, 5]])
    assert ideal_speedup(forest, SimpleNamespace(**SHAPE)) == 1.0
    assert ideal_speedup(forest, SimpleNamespace(**SHAPE, head_dim=None, sliding_window=None)) == 1.0
    shared = pack_forest([[1, 2, 3], [1, 2, 4]])
    assert ideal_speedup(shared, SimpleNamespace(**SHAPE)) == ideal_speedup(
        shared, SimpleNamespace(**SHAPE, head_dim=4)
    )
