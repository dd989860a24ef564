"""The command line of `python -m tools.warmstart`, and the recipe in it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mosaic_fast.cli import options


@dataclass(frozen=True)
class Recipe:
    """What the weights depend on."""

    steps: int = 2000
    seed: int = 0
    batch: int = 32
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 384
    rope_theta: float = (
        20.0  # small, so that neighbouring positions look different: copying is learnt at once
    )
    initializer_range: float = 0.05
    matrix_lr: float = 0.02
    lr: float = 3e-3
    warmup_steps: int = 30
    decay_frac: float = 0.6  # share of the run over which the rates fall
    final_lr_frac: float = 0.02
    drills_until: float = 0.08  # share of the run that is mostly copy drills
    some_drills_until: float = 0.5


@dataclass(frozen=True)
class Arguments:
    """Cold-start the embedded model and write it as a Hugging Face folder."""

    out: Path = Path("build/warmstart")
    """Where to write model.safetensors, config.json and the tokenizer."""
    recipe: Recipe = Recipe()
    """What the weights depend on."""
    snapshot_every: int = 0
    """Steps between copies of the unfinished model in OUT/snapshot; 0: none."""


def parse() -> Arguments:
    """The process's command line. UserError names an option that there is not."""
    return options(Arguments, "python -m tools.warmstart")
