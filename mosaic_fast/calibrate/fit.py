"""Coefficients from times, and how far they are to be trusted."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from mosaic_fast.calibrate.timing import FloatArray
from mosaic_fast.execution import CostModel


@dataclass(frozen=True)
class Fit:
    """Coefficients with what the probes say about them."""

    cost: CostModel
    fitted: FloatArray  # [P] prediction / measured - 1 by the coefficients
    forecast: FloatArray  # [P] the same by the coefficients of all other probes: nothing was fitted to it
    error: FloatArray  # [K] standard error of each coefficient relative to it; inf where it is 0


def fit(work: FloatArray, seconds: FloatArray) -> Fit:
    """Coefficients of 0 or more with the least squared relative error. work: [P, K], seconds: [P]."""
    relative = work / seconds[:, None]  # [P, K]; times the coefficients: prediction / measured
    found = _least_squares(relative)
    others = [_least_squares(np.delete(relative, probe, axis=0)) for probe in range(len(seconds))]
    fitted = relative @ found - 1
    free = max(1, len(seconds) - np.count_nonzero(found))
    error = np.sqrt((fitted**2).sum() / free) * sensitivity(relative * found)
    forecast = (relative * np.array(others)).sum(axis=1) - 1
    return Fit(CostModel(*found.tolist()), fitted, forecast, error)


def sensitivity(shares: FloatArray) -> FloatArray:  # [K]
    """How many percent each coefficient moves where independent noise moves every time by one percent.

    shares: [P, K], the part of each probe's time that a coefficient explains; inf where that is nothing. One
    coefficient that explains all of every time has 1 / sqrt(P); above 10 or so a coefficient is a guess.
    """
    used = shares.any(axis=0)
    found = np.full(shares.shape[1], np.inf)
    found[used] = np.sqrt(np.diag(np.linalg.pinv(shares[:, used].T @ shares[:, used])))
    return found


def _least_squares(relative: FloatArray) -> FloatArray:  # [K]
    """The coefficients, 0 or more, whose predictions relative @ coefficients are nearest to 1."""
    scale = np.maximum(relative.max(axis=0), np.finfo(np.float64).tiny)
    used = np.ones(relative.shape[1], np.bool_)
    while True:
        found = np.zeros(len(used))
        found[used], *_ = np.linalg.lstsq(relative[:, used] / scale[used], np.ones(len(relative)))
        if (found >= 0).all():
            return found / scale
        used[found.argmin()] = False


def as_array(cost: CostModel) -> FloatArray:  # [K]
    return np.array(astuple(cost))
