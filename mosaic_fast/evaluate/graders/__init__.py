"""Suites whose verdicts need a judge (config.EVALUATION_ONLY): each has a grader for finished episodes."""

from __future__ import annotations

from typing import Protocol

from mosaic_fast.evaluate.judging import EvaluationJudge
from mosaic_fast.preferences.episode_counts import Played
from mosaic_rollout.types import Verdict


class Grader(Protocol):
    """Finds the verdict of a finished episode by asking a judge."""

    async def probe(self) -> None:
        """Ask the judge one small question of its kind. TrainingError where it gives no valid answer."""
        ...

    async def grade(self, played: Played) -> Verdict:
        """The verdict on an episode. TrainingError where the judge gives no valid answer."""
        ...


__all__ = ["Grader", "grader_of"]


def grader_of(suite: str, judge: EvaluationJudge) -> Grader | None:
    """The grader of a suite; imported only then. None: its episodes have verdicts of their own."""
    if suite == "agentharm":
        from mosaic_fast.evaluate.graders.agentharm import AgentHarmGrader

        return AgentHarmGrader(judge)
    if suite == "privacylens":
        from mosaic_fast.evaluate.graders.privacylens import PrivacyLensGrader

        return PrivacyLensGrader(judge)
    return None
