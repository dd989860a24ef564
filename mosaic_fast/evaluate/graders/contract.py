"""What a grader takes and gives."""

from __future__ import annotations

from typing import Protocol

from mosaic_fast.preferences.episode_counts import Played
from mosaic_rollout.types import Verdict


class Grader(Protocol):
    """Finds the verdict of a finished episode by asking a judge."""

    async def probe(self) -> None:
        """Ask the judge something small of the kind that it will be asked. TrainingError likewise."""
        ...

    async def grade(self, played: Played) -> Verdict:
        """TrainingError where the judge gives no valid answer."""
        ...
