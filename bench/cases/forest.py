"""forest: building the trie of a training step against a Python dict trie ("flat" here).

16 groups of 8 rollouts, 4,000 shared tokens and 500 of their own each; with --quick a tenth of that. The
ideal is one copy of what is read and written at the speed of memory, measured in the same run:
ideal = trie time / copy time.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
from agreement import Missing
from device import Place
from measure import Result, compare

from mosaic_kernels import PackedForest, pack_forest

_GROUPS, _GROUP_SIZE, _SHARED, _OWN, _VOCABULARY = 16, 8, 4_000, 500, 32_000


def rollouts(quick: bool) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    shared, own = (_SHARED // 10, _OWN // 10) if quick else (_SHARED, _OWN)
    sequences = []
    for _ in range(_GROUPS):
        prompt = random.integers(0, _VOCABULARY, shared)
        for _ in range(_GROUP_SIZE):
            sequences.append(np.concatenate([prompt, random.integers(0, _VOCABULARY, own)]))
    return sequences


def dict_trie(sequences: list[np.ndarray]) -> dict[tuple[int, int], int]:
    """The plain way: (parent, token) -> node, one dict look-up a token."""
    nodes: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        parent = -1
        for token in sequence.tolist():
            parent = nodes.setdefault((parent, token), len(nodes))
    return nodes


VARIANTS = DEFAULT = QUICK = ("forest",)
ON_CPU = True

SECONDS = {"forest": 2}

FORMULA = "ideal = Python trie / copy of what the build reads and writes, both measured"


def check(name: str, quick: bool, place: Place) -> Missing:
    sequences = rollouts(quick)
    forest = pack_forest(sequences)
    assert forest.num_nodes == len(dict_trie(sequences)), "node count differs from the dict trie's"
    for r, sequence in enumerate(sequences):
        path = forest.node_index[forest.cu_seqlens[r] : forest.cu_seqlens[r + 1]]
        assert (forest.tokens[path] == sequence).all(), f"rollout {r} does not read back"
        assert (forest.parent[path[1:]] == path[:-1]).all(), f"rollout {r} is no path"
    return {}


def moved_bytes(sequences: list[np.ndarray], forest: PackedForest) -> int:
    """Every token read once and what the forest stores written once."""
    stored = sum(getattr(forest, name).nbytes for name in ("tokens", "positions", "subtree_end", "parent"))
    return sum(s.nbytes for s in sequences) + stored + forest.node_index.nbytes + forest.trained.nbytes


def ideal(sequences: list[np.ndarray], forest: PackedForest, trie_s: float) -> float:
    """Trie time over the time to move these bytes at memcpy speed."""
    moved = moved_bytes(sequences, forest)
    block = np.ones(moved // 2, dtype=np.uint8)
    target = np.empty_like(block)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, block)  # reads and writes moved / 2 bytes each
        times.append(time.perf_counter() - start)
    return trie_s / statistics.median(times)


def run(name: str, quick: bool, place: Place, missing: Missing) -> Result:
    sequences = rollouts(quick)
    forest = pack_forest(sequences)
    result = compare(
        {"ours": lambda: pack_forest(sequences), "flat": lambda: dict_trie(sequences)},
        repeats=3 if quick else 9,
        ideal=1.0,
        extra={
            "raw_tokens": forest.num_tokens,
            "unique_tokens": forest.num_nodes,
            "gbyte": 1e-9 * moved_bytes(sequences, forest),
        },
    )
    best = ideal(sequences, forest, result.flat_median_s)
    rate = forest.num_tokens / result.median_s
    print(f"{name}: {1e-6 * rate:.0f} M rollout tokens built a second", flush=True)
    figures = {**result.extra, "tokens_per_s": rate}
    return replace(result, ideal=best, share_of_ideal=result.ratio_to_flat / best, extra=figures)
