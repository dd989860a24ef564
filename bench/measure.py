"""Timing: contenders take turns, so that a busy machine is busy for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


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


def peak_gib(work: Callable[[], object]) -> float:
    """Most memory that PyTorch's CPU allocator holds at a time during `work`, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # pyrefly: ignore [missing-attribute]  # torch's stub lacks it
        peak = max(peak, live)
    return peak / 2**30


def compare(
    contenders: Mapping[str, Callable[[], object]], repeats: int, ideal: float, extra: Mapping[str, float]
) -> Result:
    """Time `ours` and `flat` (and whatever else is named) in turn, after one untimed round.

    Every contender's median is added to `extra` as <name>_median_s.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(repeats + 1):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            if round_number:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = times["ours"]
    ratio = medians["flat"] / medians["ours"]
    others = {f"{name}_median_s": m for name, m in medians.items() if name not in ("ours", "flat")}
    return Result(
        median_s=medians["ours"],
        spread=(max(ours) - min(ours)) / medians["ours"],
        flat_median_s=medians["flat"],
        ratio_to_flat=ratio,
        ideal=ideal,
        share_of_ideal=ratio / ideal,
        extra={**extra, **others},
    )
