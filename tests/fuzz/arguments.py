"""The command line of `python -m tests.fuzz`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mosaic_fast.cli import options


@dataclass(frozen=True)
class Arguments:
    """Feed random and damaged inputs to everything that reads one. The same seed makes the same inputs."""

    inputs: int = 10_000
    """How many, over all subjects."""
    seed: int = 0
    """Seed of the inputs."""
    only: str | None = None
    """Only this subject, all inputs for it."""
    first: int = 0
    """Number of the first input, to try one again: --only NAME --first N --inputs 1."""
    out: Path | None = None
    """JSON file for the result."""


def parse() -> Arguments:
    """The process's command line. UserError names an option that there is not."""
    return options(Arguments, "python -m tests.fuzz")
