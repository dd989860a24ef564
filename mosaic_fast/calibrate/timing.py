"""Times of probes on a machine whose speed drifts: taken in rounds, each round by its own pace."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
_SECOND_OF_SIX = 0.2  # as a quantile


@dataclass(frozen=True)
class Times:
    """What rounds say together."""

    seconds: FloatArray  # [P] of each probe, at the pace of the fastest round
    spread: FloatArray  # [P] of a probe's rounds beside that pace: half the middle half, relative
    pace: FloatArray  # [R] how much longer than the fastest round each one took; its smallest is 1


def measured(
    runs: Sequence[Callable[[], None]], rounds: int, device: torch.device, said: Callable[[int], None]
) -> FloatArray:  # [R, P]
    """Seconds of every run in every round, after a round that warms up. said: called before each round.

    A round runs each once, in an order of its own, so that no run always follows the same one. One CPU thread
    is timed by its own clock, which other processes on the machine do not move, only slow down.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times, random = np.zeros((rounds + 1, len(runs))), np.random.default_rng(0)
    for index in range(rounds + 1):
        said(index)
        for which in random.permutation(len(runs)):
            _synchronize(device)
            start = clock()
            runs[which]()
            _synchronize(device)
            times[index, which] = clock() - start
    return times[1:]


def steady(times: FloatArray) -> Times:
    """Tell the machine's pace from the probes: times[r, p] = pace[r] * seconds[p], and disturbances on top.

    A slow minute slows all probes of its rounds, so a round's pace is the median of its probes' times, each
    divided by what is typical of it; and what is typical is the second shortest of six rounds, each divided
    by its pace. A disturbance only ever makes a run longer: half of a round's probes and more than half of a
    probe's rounds may have one without any effect. times: [R, P].
    """
    pace = np.ones(len(times))
    for _ in range(20):
        typical = np.quantile(times / pace[:, None], _SECOND_OF_SIX, axis=0)
        pace = np.median(times / typical, axis=1)
    beside = times / pace[:, None]
    low, high = np.quantile(beside / np.median(beside, axis=0), [0.25, 0.75], axis=0)
    seconds = np.quantile(beside, _SECOND_OF_SIX, axis=0) * pace.min()
    return Times(seconds, (high - low) / 2, pace / pace.min())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
