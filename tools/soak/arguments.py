"""The command line of `python -m tools.soak`. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from mosaic_fast.cli import options


@dataclass(frozen=True)
class Arguments:
    """Kill a training run at random moments, resume it each time, compare it with an undisturbed one."""

    kills: int = 200
    """How often to kill; each takes some 7 seconds, most of them the start of a process."""
    seed: int = 0
    """Seed of the moments. The run is the same for each."""
    dir: str | None = None
    """Folder for the runs and soak.json; default runs/<time>-soak. Runs without a loss are removed."""
    steps: int = 20
    """Training steps of the run."""


def parse() -> Arguments:
    """The process's command line. UserError names an option that there is not."""
    return options(Arguments, "python -m tools.soak")
