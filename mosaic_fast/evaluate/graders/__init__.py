"""Suites whose verdicts need a judge (config.EVALUATION_ONLY): each has a grader for finished episodes."""

from __future__ import annotations

from mosaic_fast.evaluate.graders.contract import Grader
from mosaic_fast.evaluate.judging import EvaluationJudge

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
