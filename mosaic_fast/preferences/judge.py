"""What a judge takes and gives. Anything with a `judge` method of this shape can be one.

What a step's judgements show as a whole: how sure the judge was, and what it took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mosaic_rollout.types import Rollout


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a group of G rollouts.

    Of three rollouts, the first better than the second and as good as the third:
    preferences [[.5, 1, .5], [0, .5, .5], [.5, .5, .5]], reasons {(0, 1): "...", (0, 2): "...", ...}.
    """

    preferences: np.ndarray
    """P [G, G] float64: P[i, j] is 1 where rollout i is better than j, 0.5 for a tie, 0 where it is worse;
    between them for a judge that gives scores. P[i, j] + P[j, i] = 1; the diagonal means nothing."""
    reasons: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """Why pair (i, j), i < j, was decided so, for readers."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What judging took; summed over the groups of a step and logged as judge/<name>."""

    def reason(self, i: int, j: int) -> str:
        """Why i and j, in either order, stand as they do; empty where the judge left none."""
        return self.reasons.get((min(i, j), max(i, j)), "")


class Judge(Protocol):
    """Compares the rollouts of every group of a training step."""

    def judge(self, groups: Sequence[Sequence[Rollout]]) -> list[Judgement]:
        """One judgement a group, in order. All groups at once, so that calls to a server can overlap."""
        ...


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
