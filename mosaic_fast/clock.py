"""Seconds by phase."""

from __future__ import annotations

import time


class Clock:
    """Laps of wall time since it was made. `lap` closes one under a name."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start
