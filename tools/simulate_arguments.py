"""The command line of `python -m tools.simulate`. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from mosaic_fast.cli import options


@dataclass(frozen=True)
class Arguments:
    """Simulate the update of one training step on several ranks. Nothing is run and nothing is measured."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of ranks."""
    model: str = "qwen3-4b"
    """Folder with a config.json, or qwen3-4b."""
    cost_model: str = "default"
    """File of `python -m mosaic_fast.learner.calibrate`; default: the shipped one, of a CPU."""
    tflops: float = 0.0
    """Scale the cost model so that its linear layers run at this rate, in TFLOP/s; 0: as measured."""
    gigabytes_per_s: float = 40.0
    """What a rank sends and receives at once."""
    latency_us: float = 5.0
    """Of one step of a ring; a collective on N ranks takes N - 1."""
    tasks: int = 64
    """Groups of the step."""
    group_size: int = 8
    """Rollouts of a group."""
    tokens_per_microbatch: int = 16384
    """As forest.tokens_per_microbatch."""
    seed: int = 0
    """Of the made-up rollouts."""


def parse() -> Arguments:
    """The process's command line. UserError names an option that there is not."""
    return options(Arguments, "python -m tools.simulate")
