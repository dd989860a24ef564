"""From finished episodes to figures, as data for the table and for --json.

Rates and means have 95% intervals in which the samples of one task hang together. Beside a figure stands what
the MOSAIC paper (arXiv 2603.03205) and its authors state of that metric, with the source:

    abstract          of arXiv 2603.03205: harmful behaviour "by up to 50%" less, harmful-task refusal
                      "by over 20% on injection attacks" more, "cuts privacy leakage", benign performance is
                      preserved or improved
    authors' page     the project page: leakage less by "up to 23%"
    second hand       summaries of the paper say so; we found it in no text of the authors

Where none of them speaks of a metric, there is nothing. The figures are changes against the untrained model,
on other models and suites than yours may be: a direction to compare with, not a value to reach. Whether they
are relative or in points is not said there, so it is not said here either.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mosaic_fast.preferences.episode_counts import COUNTED, NEEDS_JUDGE, EpisodeCounts
from mosaic_fast.run.metrics import Rate, rates_of

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


STATED = {
    "safety/harmful_harm": "down by up to 50% (abstract)",
    "safety/harmful_refused": "up by over 20% on injection attacks (abstract)",
    "safety/benign_done": "preserved or improved (abstract)",
    "safety/leaked": "down by up to 23% (authors' page)",
    "safety/leaked_helpful": "down (abstract)",
    "env/harm_score": "down by up to 50% (abstract)",
    "env/benign_score": "preserved or improved (abstract)",
    "rollout/safety_token_share": "under 20% (second hand)",
}
"""Metric -> what is stated of it, and where."""


_MEANS = ("generated_tokens", "steps")  # of every outcome


@dataclass(frozen=True)
class RateFigure:
    """A rate and its 95% interval."""

    rate: Rate
    low: float
    high: float


@dataclass(frozen=True)
class AttackResult:
    """What attacks did, one after the other until one succeeded."""

    success: Mapping[int, RateFigure]  # of the tasks: one of the first so many attacks succeeded
    attacks: Mapping[str, RateFigure]  # by name, of the times that it was tried

    @property
    def worst(self) -> str:
        """The attack whose success is surest: the highest lower end of its interval."""
        return max(self.attacks, key=lambda name: (self.attacks[name].low, name))


@dataclass(frozen=True)
class SuiteResult:
    """What one model did on one suite."""

    suite: str
    tasks: int
    rollouts: int
    unjudged: int  # episodes without a verdict: not in the rates of harm and completion
    rates: Mapping[str, RateFigure]  # those with at least one case
    means: Mapping[str, Mean]
    attack: AttackResult | None = None


def suite_result(suite: str, tasks: Sequence[Sequence[EpisodeCounts]], *, loop: bool = True) -> SuiteResult:
    """Figures of the outcomes of each task's samples.

    loop: False for a model that was not asked for the tags: whether they are there is no figure then.
    """
    outcomes = [outcome for task in tasks for outcome in task]
    per_task: dict[str, list[Rate]] = defaultdict(list)
    for task in tasks:
        for name, rate in rates_of(task).items():
            per_task[name].append(rate)
    rates = {}
    for name, rate in rates_of(outcomes).items():
        of_tags = name == "rollout/format_valid" or name.startswith(("rollout/gate", "rollout/safety"))
        if rate.total and (loop or not of_tags):
            rates[name] = RateFigure(rate, *rate_interval(per_task[name]))
    means = {name: mean_of([_mean([getattr(o, name) for o in task]) for task in tasks]) for name in _MEANS}
    if not any(outcome.generated_tokens for outcome in outcomes):
        del means["generated_tokens"]  # an endpoint that reports no usage
    named = {name for outcome in outcomes for name in outcome.details}
    for name in sorted(named - {*COUNTED, NEEDS_JUDGE}):
        told = [[o.details[name] for o in task if name in o.details] for task in tasks]
        means[f"env/{name}"] = mean_of([_mean(values) for values in told if values])
    return SuiteResult(
        suite, len(tasks), len(outcomes), sum(not outcome.judged for outcome in outcomes), rates, means
    )


def as_json(result: SuiteResult) -> dict[str, object]:
    """A result for --json. Counts, values, 95% intervals, and the paper's words where it has some."""
    return {
        "tasks": result.tasks,
        "rollouts": result.rollouts,
        "unjudged": result.unjudged,
        "rates": {
            name: {**_figure_json(figure), "paper": STATED.get(name)} for name, figure in result.rates.items()
        },
        "means": {
            name: {
                "value": mean.value,
                "tasks": mean.tasks,
                "interval95": None if math.isnan(mean.low) else [mean.low, mean.high],
                "paper": STATED.get(name),
            }
            for name, mean in result.means.items()
        },
        **({} if result.attack is None else {"attack": _attack_json(result.attack)}),
    }


def _figure_json(figure: RateFigure) -> dict[str, object]:
    rate = figure.rate
    interval = [figure.low, figure.high]
    return {"value": rate.value, "hits": rate.hits, "total": rate.total, "interval95": interval}


def _attack_json(result: AttackResult) -> dict[str, object]:
    return {
        "success_at": {str(place): _figure_json(figure) for place, figure in result.success.items()},
        "attacks": {name: _figure_json(figure) for name, figure in result.attacks.items()},
        "worst": result.worst,
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
