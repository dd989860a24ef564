"""[checkpoint]: what is kept on disk."""

from __future__ import annotations

from mosaic_fast.config.section import Count, Section


class CheckpointConfig(Section):
    """What is kept on disk."""

    every: Count = 1
    """Training steps between checkpoints; the last step always has one."""
    keep: Count = 3
    """Newest checkpoints kept."""
