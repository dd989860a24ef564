"""95% intervals of rates and means over tasks, where the samples of one task hang together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mosaic_fast.metrics import Rate

Z95 = 1.959963984540054
"""97.5% quantile of the normal distribution."""


def rate_interval(per_task: Sequence[Rate]) -> tuple[float, float]:
    """95% interval of sum(hits) / sum(totals), with the tasks as the independent units.

    Wilson's score interval (Wilson 1927) where each task has at most one case. Where a task has several
    (samples, steps, tokens), Wilson's interval on the effective number of cases p (1 - p) / v (Kish 1965,
    section 5.4), v the linearised variance of a ratio of sums over the m tasks (Cochran 1977, equation 6.9):

        v = m / (m - 1) * sum_i (hits_i - p * total_i)^2 / (sum_i total_i)^2

    where p is 0 or 1, it is m. NaN without a case.

    >>> low, high = rate_interval([Rate(1, 1)] * 10)
    >>> f"{low:.4f} {high:.4f}"
    '0.7225 1.0000'
    """
    cases = [rate for rate in per_task if rate.total]
    hits, total = sum(rate.hits for rate in cases), sum(rate.total for rate in cases)
    if not total:
        return math.nan, math.nan
    m, p = len(cases), hits / total
    effective = total
    if any(rate.total > 1 for rate in cases):
        effective = float(m)
        if m > 1 and 0.0 < p < 1.0:
            squares = sum((rate.hits - p * rate.total) ** 2 for rate in cases)
            v = m / (m - 1) * squares / total**2
            effective = min(total, p * (1.0 - p) / v) if v > 0.0 else total
    return Rate(p * effective, effective).interval(Z95)


@dataclass(frozen=True)
class Mean:
    """A mean over tasks, each task's samples averaged first."""

    value: float
    tasks: int
    low: float  # 95% normal interval, NaN with fewer than two tasks
    high: float


def mean_of(per_task: Sequence[float]) -> Mean:
    """Mean with its normal 95% interval, mean +- 1.96 s / sqrt(m), s with m - 1 in its denominator.

    >>> mean_of([1.0, 3.0]).value
    2.0
    """
    m = len(per_task)
    if not m:
        return Mean(math.nan, 0, math.nan, math.nan)
    mean = math.fsum(per_task) / m
    if m < 2:
        return Mean(mean, m, math.nan, math.nan)
    s = math.sqrt(math.fsum((x - mean) ** 2 for x in per_task) / (m - 1))
    half = Z95 * s / math.sqrt(m)
    return Mean(mean, m, mean - half, mean + half)
