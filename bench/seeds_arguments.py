"""The command line of bench/seeds.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mosaic_fast.cli import options


@dataclass(frozen=True)
class Arguments:
    """Train several seeds of the default run and tabulate what they reach."""

    seeds: int = 5
    """Seeds 0, 1, ..."""
    tasks: int = 600
    """Tasks an evaluation."""
    folder: Path = Path("runs/seeds")
    """Where the runs are."""
    out: Path | None = None
    """Write the table to this file too."""


def parse() -> Arguments:
    """The process's command line. UserError names an option that there is not."""
    return options(Arguments, "python bench/seeds.py")
