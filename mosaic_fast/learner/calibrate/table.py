"""What a calibration says of itself: each probe beside its forecast, each coefficient with its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from rich.box import MARKDOWN
from rich.table import Table

from mosaic_fast.learner.calibrate.measure import Fit, Probe, Times, as_array
from mosaic_fast.learner.execution import CostModel

NAMES = tuple(field.name for field in fields(CostModel))
FORECAST_OFF = 0.25  # of a probe, by the coefficients of the others: plans differ by more where it matters
ERROR = 0.35  # of a coefficient
SPREAD = 0.10  # of a probe's rounds beside the machine's pace


def probe_table(probes: Sequence[Probe], times: Times, fit: Fit) -> Table:
    """How far predictions are off: `fit` by the coefficients, `forecast` by ones fitted to the others."""
    table = Table(box=MARKDOWN)
    for head in ("model", "forest", "plan", "ms", "spread", "fit", "forecast"):
        table.add_column(head, justify="right")
    for index, probe in enumerate(probes):
        table.add_row(
            probe.model,
            str(probe),
            probe.plan,
            f"{times.seconds[index] * 1e3:.1f}",
            f"{times.spread[index]:.0%}",
            f"{fit.fitted[index]:+.0%}",
            f"{fit.forecast[index]:+.0%}",
        )
    return table


def coefficient_table(fit: Fit) -> Table:
    """+-: the standard error, from what the fit leaves unexplained."""
    table = Table(box=MARKDOWN)
    for head in ("work", "seconds a unit", "+-"):
        table.add_column(head, justify="right")
    for name, value, error in zip(NAMES, as_array(fit.cost), fit.error, strict=True):
        table.add_row(name, f"{value:.3g}", f"{error:.0%}" if np.isfinite(error) else "not found")
    return table


def doubts(probes: Sequence[Probe], times: Times, fit: Fit) -> list[str]:
    """Where the coefficients are not to be trusted, a sentence each; nothing where they are."""
    found = []
    for name, error in zip(NAMES, fit.error, strict=True):
        if not np.isfinite(error):
            found.append(f"{name}: 0 fits best, which is hardly true: this kind of work is taken to be free")
        elif error > ERROR:
            found.append(f"{name}: known to within {error:.0%} only (good: {ERROR:.0%})")
    for index, probe in enumerate(probes):
        what = f"{probe.model} model, {probe}, {probe.plan}"
        if abs(fit.forecast[index]) > FORECAST_OFF:
            found.append(f"{what}: forecast off by {fit.forecast[index]:+.0%} (good: {FORECAST_OFF:.0%})")
        if times.spread[index] > SPREAD:
            found.append(f"{what}: rounds differ by {times.spread[index]:.0%} (good: {SPREAD:.0%})")
    return found


def summary(fit: Fit) -> str:
    """For the file's `about`."""
    off = np.abs(fit.forecast)
    return f"forecasts of probes off by {np.median(off):.0%} (median), {off.max():.0%} (most)"
