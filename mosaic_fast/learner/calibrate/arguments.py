"""The command line of `python -m mosaic_fast.learner.calibrate`. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from mosaic_fast.cli import options


@dataclass(frozen=True)
class Arguments:
    """Measure this machine for forest.cost_model. Takes well under a minute; leave the machine alone."""

    out: str = "cost.toml"
    """File to write."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    dtype: str = "float32"
    """float32 or bfloat16, as model.dtype."""
    threads: int = 1
    """CPU threads of PyTorch, as model.threads."""


def parse() -> Arguments:
    """The process's command line. UserError names an option that there is not."""
    return options(Arguments, "python -m mosaic_fast.learner.calibrate")
