"""pack_forest against a trie of Python dicts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_kernels import PackedForest, pack_forest
from tests.kernels.strategies import Rollouts, rollouts


def dict_trie(sequences: list[list[int]]) -> dict[tuple[int, ...], int]:
    """Every distinct prefix -> its depth-first number, siblings by token id."""
    prefixes = {tuple(s[: t + 1]) for s in sequences for t in range(len(s))}
    return {prefix: number for number, prefix in enumerate(sorted(prefixes))}


def assert_is_trie_of(forest: PackedForest, drawn: Rollouts) -> None:
    number = dict_trie(drawn.sequences)
    prefixes = list(number)
    assert forest.tokens.tolist() == [p[-1] for p in prefixes]
    assert forest.positions.tolist() == [len(p) - 1 for p in prefixes]
    assert forest.parent.tolist() == [number.get(p[:-1], -1) for p in prefixes]
    descendants = [sum(other[: len(p)] == p for other in prefixes) for p in prefixes]
    assert forest.subtree_end.tolist() == [n + d for n, d in enumerate(descendants)]
    paths = [number[tuple(s[: t + 1])] for s in drawn.sequences for t in range(len(s))]
    assert forest.node_index.tolist() == paths
    assert forest.cu_seqlens.tolist() == np.cumsum([0, *map(len, drawn.sequences)]).tolist()
    assert forest.trained.tolist() == [bit for mask in drawn.trained for bit in mask]


@given(rollouts(max_rollouts=10, max_length=40))
def test_equals_a_trie_of_dicts(drawn: Rollouts) -> None:
    assert_is_trie_of(drawn.pack(), drawn)


@given(rollouts(max_rollouts=6, max_length=30))
def test_uninitialised_memory_never_shows(drawn: Rollouts) -> None:
    real = np.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, -77, dtype))
        forest = drawn.pack()
    assert np.empty is real
    assert_is_trie_of(forest, drawn)


@pytest.mark.parametrize(
    "sequences",
    [
        [],
        [[]],
        [[], []],
        [[0]],
        [[3], [3], []],
        [[0, 0], [0], [0, 0, 0]],  # zeros: nothing may be lost to padding or to strings ending in NUL
        [[256], [1], [65536], [2**32 - 1]],  # byte order must be the order of ids
        [[1] * 16, [1] * 16, [1] * 17],  # as long as the first vectorised comparison
        [[1] * 15 + [2], [1] * 16, [1] * 15],
        [list(range(n)) for n in range(40)],  # a chain of strict prefixes
    ],
    ids=str,
)
def test_edge_shapes(sequences: list[list[int]]) -> None:
    trained = [[t > 0 for t in range(len(s))] for s in sequences]
    assert_is_trie_of(pack_forest(sequences), Rollouts(sequences, trained))


def test_ten_thousand_rollouts_of_unequal_groups() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, size=rng.integers(1, 9)).tolist() for _ in range(40)]
    sequences = [
        prompts[int(rng.integers(40)) ** 2 % 40] + rng.integers(5, size=4).tolist() for _ in range(10_000)
    ]
    forest = pack_forest(sequences)
    number = dict_trie(sequences)
    assert forest.num_nodes == len(number)
    assert forest.num_rollouts == 10_000
    assert forest.node_index.tolist() == [number[tuple(s[: t + 1])] for s in sequences for t in range(len(s))]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64, np.uint64])
def test_any_integer_dtype_and_strides(dtype: type) -> None:
    base = np.arange(20, dtype=dtype)
    forest = pack_forest([base[::2], base[::-1]])
    assert forest.tokens.dtype == np.int64
    assert forest.tokens[forest.node_index].tolist() == base[::2].tolist() + base[::-1].tolist()


@pytest.mark.parametrize(
    ("sequences", "trained", "message"),
    [
        ([[1, 2], [3, -4]], None, r"sequences\[1\]\[1\] is -4"),
        ([[1], [2**32]], None, r"sequences\[1\]\[0\] is 4294967296"),
        ([[1.5]], None, r"sequences\[0\] must hold integers"),
        ([[True]], None, r"sequences\[0\] must hold integers"),
        ([[[1]]], None, r"sequences\[0\] must be one-dimensional"),
        ([[1, 2]], [[True, True]], r"trained\[0\]\[0\] is True"),
        ([[], [1], [2]], [[], [False], [True]], r"trained\[2\]\[0\] is True"),
        ([[1, 2]], [[False]], r"trained\[0\] has shape \(1,\), sequences\[0\] has 2 tokens"),
        ([[1, 2]], [], r"0 masks for 1 sequences"),
        ([[1, 2]], [[0, 1]], r"trained\[0\] must hold booleans"),
    ],
)
def test_malformed_input_is_named(sequences: list, trained: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_forest(sequences, trained)


@given(st.data())
def test_order_of_rollouts_only_permutes_them(data: st.DataObject) -> None:
    drawn = data.draw(rollouts(max_rollouts=6, max_length=12))
    order = data.draw(st.permutations(range(len(drawn.sequences))))
    forest, moved = drawn.pack(), pack_forest([drawn.sequences[i] for i in order])
    assert forest.tokens.tolist() == moved.tokens.tolist()
    assert forest.subtree_end.tolist() == moved.subtree_end.tolist()
