"""[trackers]: where progress is shown."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mosaic_fast.config.section import Section


class TrackersConfig(Section):
    """Where progress is shown, beside metrics.jsonl."""

    console: Literal["auto", "live", "plain", "quiet"] = "auto"
    """live: a table that redraws itself; plain: a line a step; auto: live on a terminal, else plain."""
    log_to: Annotated[tuple[Literal["wandb", "trackio", "tensorboard"], ...], Field(strict=False)] = ()
    """Trackers that get every metric as well: wandb, trackio, tensorboard (extras of the same names)."""
    project: str = "mosaic_fast"
    """wandb, trackio: the project that the run appears in."""
