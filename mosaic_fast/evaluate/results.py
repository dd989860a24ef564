"""From finished episodes to figures with intervals, as data for the table and for --json."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mosaic_fast.evaluate.intervals import Mean, mean_of, rate_interval
from mosaic_fast.evaluate.paper import STATED
from mosaic_fast.metrics import Rate, outcome_rates
from mosaic_fast.outcome import COUNTED, NEEDS_JUDGE, Outcome

_MEANS = ("generated_tokens", "steps")  # of every outcome


@dataclass(frozen=True)
class RateFigure:
    """A rate and its 95% interval."""

    rate: Rate
    low: float
    high: float


@dataclass(frozen=True)
class SuiteResult:
    """What one model did on one suite."""

    suite: str
    tasks: int
    rollouts: int
    unjudged: int  # episodes without a verdict: not in the rates of harm and completion
    rates: Mapping[str, RateFigure]  # those with at least one case
    means: Mapping[str, Mean]


def suite_result(suite: str, tasks: Sequence[Sequence[Outcome]], *, loop: bool = True) -> SuiteResult:
    """Figures of the outcomes of each task's samples.

    loop: False for a model that was not asked for the tags: whether they are there is no figure then.
    """
    outcomes = [outcome for task in tasks for outcome in task]
    per_task: dict[str, list[Rate]] = defaultdict(list)
    for task in tasks:
        for name, rate in outcome_rates(task).items():
            per_task[name].append(rate)
    rates = {}
    for name, rate in outcome_rates(outcomes).items():
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
            name: {
                "value": figure.rate.value,
                "hits": figure.rate.hits,
                "total": figure.rate.total,
                "interval95": [figure.low, figure.high],
                "paper": STATED.get(name),
            }
            for name, figure in result.rates.items()
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
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
