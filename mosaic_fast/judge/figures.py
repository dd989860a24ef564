"""What a step's judgements show as a whole: how sure the judge was, and what it took."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mosaic_fast.judge.contract import Judgement


def judgement_figures(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Metrics of a step: share of ties and of intransitive triples, the judge's own counts, its flip rate.

    A judge that counts `pairs_asked` and `flips` (pairs whose two orders disagreed) gets judge/flip_rate.
    Shares of nothing are left out.
    """
    pairs = ties = triples = intransitive = 0.0
    counts: dict[str, float] = {}
    for judgement in judgements:
        above = judgement.preferences[np.triu_indices(len(judgement.preferences), 1)]
        pairs, ties = pairs + len(above), ties + float((above == 0.5).sum())
        in_cycles, all_triples = intransitive_triples(judgement.preferences)
        intransitive, triples = intransitive + in_cycles, triples + all_triples
        for name, value in judgement.counts.items():
            counts[name] = counts.get(name, 0.0) + value
    figures = {f"judge/{name}": value for name, value in counts.items()}
    if pairs:
        figures["judge/tie_frac"] = ties / pairs
    if triples:
        figures["judge/intransitive_frac"] = intransitive / triples
    if counts.get("pairs_asked"):
        figures["judge/flip_rate"] = counts.get("flips", 0.0) / counts["pairs_asked"]
    return figures


def intransitive_triples(preferences: np.ndarray) -> tuple[int, int]:
    """(triples whose comparisons form a cycle, all triples) of P [G, G].

    Three rollouts are a cycle where each is better than the next: i > j > k > i.

    >>> intransitive_triples(np.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]))
    (1, 1)
    """
    better = (preferences > 0.5).astype(np.int64)
    np.fill_diagonal(better, 0)
    size = len(better)
    cycles = int(np.trace(better @ better @ better)) // 3  # a cycle is met once from each of its three
    return cycles, size * (size - 1) * (size - 2) // 6
