"""Ctrl-C and SIGTERM: what can be played again is abandoned, what cannot is finished and kept.

`Clock` takes the seconds of a step's phases.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Stopped(KeyboardInterrupt):
    """Work was abandoned because the user asked the run to stop."""


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets `requested`; the second one stops at once.

    one_of_many: torchrun passes a Ctrl-C on as a SIGTERM, after the terminal has sent the SIGINT itself, and
        sends a SIGTERM where another rank has died: only a second SIGINT stops at once, and nothing is said.
    """

    def __init__(self, *, one_of_many: bool = False) -> None:
        self.requested, self._one_of_many = False, one_of_many
        self._abandonable = 0  # entered `abandonable` blocks
        self._put_off = False  # a signal came at a bad moment and is sent once more
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
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

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Enter it around work that can be thrown away and done again: the first signal ends it with Stopped.

        The tasks of an event loop are cancelled, so that each can put its things in order; a call that
        blocks the loop ends first. In other threads than the main one, which get no signals, it does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._abandonable += 1
        try:
            if self.requested:
                raise Stopped
            yield
        except asyncio.CancelledError:
            if self.requested:
                raise Stopped from None
            raise
        finally:
            self._abandonable -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._put_off = self._put_off, False
        first, self.requested = again or not self.requested, True
        if not first and not (self._one_of_many and number == signal.SIGTERM):
            raise KeyboardInterrupt
        if not first:
            return
        if not self._one_of_many and not again:
            print("\nstopping; once more to stop at once", file=sys.stderr)
        if not self._abandonable or _cancel_tasks():
            return
        if not _in_asyncio(frame):
            raise Stopped
        self._put_off = True
        timer = threading.Timer(_PUT_OFF_S, signal.pthread_kill, (threading.get_ident(), number))
        timer.daemon = True
        timer.start()


_PUT_OFF_S = 0.02


def _in_asyncio(frame: FrameType | None) -> bool:
    """Whether asyncio is making or closing a loop: half of one left behind prints a traceback as it goes."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("asyncio."):
            return True
        frame = frame.f_back
    return False


def _cancel_tasks() -> bool:
    """Cancel all tasks of the loop that runs in this thread; False where none does."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return False
    for task in asyncio.all_tasks(loop):
        loop.call_soon_threadsafe(task.cancel)  # which wakes a loop that waits
    return True


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
