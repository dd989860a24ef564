"""Ctrl-C that lets the step under way end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets `requested`; the second one stops at once.

    one_of_many: torchrun passes a Ctrl-C on as a SIGTERM, after the terminal has sent the SIGINT itself, and
        sends a SIGTERM where another rank has died: only a second SIGINT stops at once, and nothing is said.
    """

    def __init__(self, *, one_of_many: bool = False) -> None:
        self.requested, self._one_of_many = False, one_of_many
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._one_of_many and kind is not None:
            return  # a SIGTERM must not cut off what this rank has to say of its failure
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._one_of_many and (not self.requested or number == signal.SIGTERM):
            self.requested = True
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)
