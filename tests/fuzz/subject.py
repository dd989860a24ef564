"""What is fuzzed: a subject takes a generator of random numbers and says what came of one input."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

Try = Callable[[Random], str]
"""Makes an input, feeds it, and returns what came of it, such as "accepted"; any exception is a failure."""

STUCK_S = 60
"""Seconds after which an input counts as one that the program hangs on; the slowest takes below one."""


@dataclass(frozen=True)
class Subject:
    """`share`: of all inputs. `open(folder)`: what it needs, for the duration of a `with` block."""

    name: str
    share: float
    open: Callable[[Path], AbstractContextManager[Try]]


@dataclass
class Result:
    """What came of a subject's inputs."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # "input 17: KeyError: 'x'"


def fuzz(
    subject: Subject, folder: Path, seed: int, inputs: range, tell: Callable[[], None] = lambda: None
) -> Result:
    """Try inputs by number. Each depends on (seed, subject, number) alone, so that one can be tried again."""
    result = Result()
    folder.mkdir(parents=True, exist_ok=True)
    with subject.open(folder) as attempt:
        for number in inputs:
            try:
                with _limited():
                    result.outcomes[attempt(Random(f"{seed}|{subject.name}|{number}"))] += 1
            except Exception as error:  # noqa: BLE001  whatever it is, it is what we look for
                result.failures.append(f"input {number}: {type(error).__name__}: {error}"[:600])
            tell()
    return result


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stuck(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"nothing came of it in {STUCK_S} s")

    previous = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(STUCK_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
