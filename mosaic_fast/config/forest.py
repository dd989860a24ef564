"""[forest]: how rollouts are packed for the update."""

from __future__ import annotations

from typing import Literal

from mosaic_fast.config.section import Count, Section


class ForestConfig(Section):
    """How rollouts are packed for the update."""

    tokens_per_microbatch: Count = 8192
    """Tokens forwarded and held at once; a forest above it is cut, exactly. At least those of a rollout."""
    cost_model: str = "default"
    """File of `python -m mosaic_fast.calibrate`: what work costs, to choose how a forest is run."""
    credit: Literal["sum", "mean", "first", "subtree"] = "sum"
    """What an inherited token gets: all its holders' terms, their mean, its sampler's, or its branch's."""
