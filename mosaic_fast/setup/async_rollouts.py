"""Rollouts of the next steps while a step trains.

With max_staleness = 0 a step's rollouts are sampled when it begins, by the weights that it trains: on policy.
With s above 0 up to s steps are sampled ahead, in order, in a thread. The engine takes new weights only when
it is idle and the trainer stands between two steps, so that no sample mixes two policies and none is cut
short. A step whose rollouts would be more than s updates old when they are trained on is not begun yet.
Nothing is dropped: where rollouts are slow, the trainer waits.

    s = 1    plays  0 . 1 . 2 . 3         each by the weights after the step before last
             trains     0   1   2
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

Groups = TypeVar("Groups")


class AsyncRollouts(Generic[Groups]):
    """Plays the steps up to `steps` in order, at most `max_staleness` of them ahead of the trainer.

    publish: hand the trainer's weights to the engine as a version; called while nothing is played.
    play: the rollouts of a step, by the weights last published; called in a thread if max_staleness > 0.
    abandon: have what is played in the thread end early. abandonable: entered while it is waited for.
    """

    def __init__(
        self,
        publish: Callable[[int], None],
        play: Callable[[int], Groups],
        *,
        max_staleness: int,
        steps: int,
        abandon: Callable[[], None] = lambda: None,
        abandonable: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._abandon, self._abandonable = abandon, abandonable
        self._publish, self._play = publish, play
        self._max_staleness, self._steps = max_staleness, steps
        self._playing: deque[Future[Groups]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")

    def take(self, step: int) -> Groups:
        """The rollouts of a step, asked for in turn before it is trained on. Raises what playing raised.

        When it returns, the weights may be changed until it is called again.
        """
        if not self._playing:
            self._publish(step)
            if not self._max_staleness:
                return self._play(step)
            self._start(step, step + 1)
        with self._abandonable():
            groups = self._playing[0].result()
        self._playing.popleft()
        if not self._playing and step + 1 < self._steps:
            self._publish(step)
            self._start(step + 1, min(self._steps, step + 1 + self._max_staleness))
        return groups

    def wait(self) -> None:
        """Wait until the engine is idle, so that others may use it. What has been played is kept."""
        with self._abandonable():
            wait(self._playing)

    def close(self) -> None:
        """Drop all steps played ahead, the one under way included."""
        self._abandon()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, first: int, stop: int) -> None:
        for step in range(first, stop):
            self._playing.append(self._thread.submit(self._play, step))
