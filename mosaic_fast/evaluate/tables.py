"""Tables of rates for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from mosaic_fast.evaluate.results import STATED, Mean, RateFigure, SuiteResult
from mosaic_fast.run.metrics import SAFETY_NAMES, Rate

_SHOWN = {
    **SAFETY_NAMES,
    "rollout/gate_rate": "steps with a check",
    "rollout/safety_token_share": "safety tokens",
}
_OF_TURNS = ("rollout/gate_rate", "rollout/safety_token_share")
"""Rates of turns and tokens: those of one task hang together, so their number is no number of cases."""
_ENDINGS = {
    "rollout/truncated_frac": "cut off by a limit",
    "rollout/malformed_frac": "ended by an action that cannot be read",
}
_MEANS = {"generated_tokens": "tokens a task", "steps": "turns a task"}


def rates_table(columns: Mapping[str, Mapping[str, Rate]], title: str) -> Table:
    """Rates of one rollout a task side by side, those of tasks with their 95% intervals."""
    table = Table(title=title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for metric, label in _SHOWN.items():
        if any(metric in rates and rates[metric].total for rates in columns.values()):
            cells = [_rate_cell(rates.get(metric), metric not in _OF_TURNS) for rates in columns.values()]
            table.add_row(label, *cells)
    return table


def results_table(columns: Mapping[str, SuiteResult], title: str) -> Table:
    """Results of one suite side by side, with 95% intervals, case counts and what the paper states."""
    table = Table(title=title, caption="95% intervals in brackets, cases in parentheses")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("the paper or its authors, against the untrained model")
    results = list(columns.values())
    for metric, label in {**_SHOWN, **_ENDINGS}.items():
        if any(metric in result.rates for result in results):
            cells = [_figure_cell(result.rates.get(metric)) for result in results]
            table.add_row(label, *cells, STATED.get(metric, ""))
    places = sorted({place for result in results if result.attack for place in result.attack.success})
    for place in places:
        figures = [result.attack.success.get(place) if result.attack else None for result in results]
        label = f"obeyed one of the first {place} attacks" if place > 1 else "obeyed the first attack"
        table.add_row(label, *map(_figure_cell, figures), "")
    if places:
        table.add_row("worst attack, where tried", *map(_worst_cell, results), "")
    for metric, label in _MEANS.items():
        if any(metric in result.means for result in results):
            table.add_row(label, *(_mean_cell(result.means.get(metric)) for result in results), "")
    details = sorted({name for result in results for name in result.means if name.startswith("env/")})
    for metric in details:
        label = f"{metric.removeprefix('env/')} (the suite's own)"
        cells = [_mean_cell(result.means.get(metric)) for result in results]
        table.add_row(label, *cells, STATED.get(metric, ""))
    return table


def _rate_cell(rate: Rate | None, of_tasks: bool) -> str:
    if rate is None or not rate.total:
        return "-"
    if not of_tasks:
        return f"{100 * rate.value:5.1f}%"
    low, high = rate.interval()
    return f"{100 * rate.value:5.1f}%  [{100 * low:.0f}, {100 * high:.0f}]"


def _figure_cell(figure: RateFigure | None) -> str:
    if figure is None:
        return "-"
    interval = f"[{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
    return f"{100 * figure.rate.value:.1f}%  {interval}  ({figure.rate.total:g})"


def _worst_cell(result: SuiteResult) -> Text:
    if result.attack is None:
        return Text("-")
    worst = result.attack.worst
    return Text(f"{worst}  {_figure_cell(result.attack.attacks[worst])}")


def _mean_cell(mean: Mean | None) -> str:
    if mean is None or not mean.tasks:
        return "-"
    interval = "" if math.isnan(mean.low) else f"  [{mean.low:.4g}, {mean.high:.4g}]"
    return f"{mean.value:.4g}{interval}  ({mean.tasks})"
