"""Timing: contenders take turns, so that a busy machine is busy for all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from device import CPU, Place

FEWEST = 2  # timed rounds, however long they take
SHORT = 0.5  # who takes at most this share of the longest one's time has a turn after each that takes longer


@dataclass(frozen=True)
class Timing:
    """One contender's timed rounds."""

    median_s: float
    spread: float  # (slowest - fastest) / median


@dataclass(frozen=True)
class Result:
    """What one case found. Speed-ups are of medians; each case's docstring says what its ideal is."""

    median_s: float  # ours
    spread: float  # (slowest - fastest) / median of ours
    flat_median_s: float
    ratio_to_flat: float  # flat / ours
    ideal: float  # the ratio that the work itself allows
    share_of_ideal: float
    extra: dict[str, float]  # more figures of the case
    contenders: dict[str, Timing] = field(default_factory=dict)  # all of them, ours and flat included
    not_run: dict[str, str] = field(default_factory=dict)  # peer -> why it does not run here
    device: str = "cpu"  # type of the device that computed


def compare(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    ideal: float,
    extra: Mapping[str, float],
    *,
    peaks: Sequence[str] = (),
    warm: bool = True,
    budget_s: float = math.inf,
    not_run: Mapping[str, str] | None = None,
    place: Place = CPU,
) -> Result:
    """Time `ours`, `flat` and what else is named in turn, each round another first, after an untimed one.

    repeats: how many timed rounds; fewer, but FEWEST, where they have taken `budget_s` seconds.
    warm: False without the untimed round, where check() has just run the same.
    From the second round on SHORT ones have several turns a round, spread over it: one short turn would see a
    moment of a machine whose speed drifts, and a long one its average.
    place: the device, which is waited for after each call, and whose memory is looked at.
    A contender that returns seconds (a float) has timed itself, in a process of its own; those count then.
    Every contender's median is added to `extra` as <name>_median_s, and, where named in `peaks`, the memory
    of its untimed round as <name>_peak_gib (ours: peak_gib); also `rounds`, how many were timed.
    """
    contenders = {name: place.finished(work) for name, work in contenders.items()}
    figures = dict(extra)
    for name, work in contenders.items():
        if name in peaks:
            figures["peak_gib" if name == "ours" else f"{name}_peak_gib"] = place.peak_gib(work)
        elif warm:
            work()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    turns = list(contenders)
    began, rounds = time.perf_counter(), 0
    while rounds < repeats and (rounds < FEWEST or time.perf_counter() - began < budget_s):
        rounds += 1
        for name in _with_short_ones(turns, times):
            start = time.perf_counter()
            own = contenders[name]()
            times[name].append(own if isinstance(own, float) else time.perf_counter() - start)
        turns.append(turns.pop(0))  # nobody always follows the same one
    timings = {}
    for name, values in times.items():
        median = statistics.median(values)
        timings[name] = Timing(median, (max(values) - min(values)) / median)
    ours, flat = timings["ours"], timings["flat"]
    ratio = flat.median_s / ours.median_s
    figures["rounds"] = rounds
    figures |= {f"{name}_median_s": t.median_s for name, t in timings.items() if name not in ("ours", "flat")}
    return Result(
        median_s=ours.median_s,
        spread=ours.spread,
        flat_median_s=flat.median_s,
        ratio_to_flat=ratio,
        ideal=ideal,
        share_of_ideal=ratio / ideal,
        extra=figures,
        contenders=timings,
        not_run=dict(not_run or {}),
        device=place.device.type,
    )


def _with_short_ones(turns: Sequence[str], times: Mapping[str, Sequence[float]]) -> list[str]:
    """A round's turns: short contenders after each of the others; all once where nothing is timed yet."""
    if not all(times.values()):
        return list(turns)
    shortest = {name: min(times[name]) for name in turns}
    short = [name for name in turns if shortest[name] <= SHORT * max(shortest.values())]
    return [one for name in turns if name not in short for one in (name, *short)]
