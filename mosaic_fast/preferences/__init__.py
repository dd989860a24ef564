"""The judge compares the rollouts of a group pair by pair (MOSAIC, arXiv 2603.03205)."""

from mosaic_fast.preferences.judge import Judge, Judgement, judgement_figures
from mosaic_fast.preferences.load import build_judge
from mosaic_fast.preferences.record import judge_record, keep_judge_record, probe_judge
from mosaic_fast.preferences.rule_judge import RuleJudge, standing

__all__ = [
    "Judge",
    "Judgement",
    "RuleJudge",
    "build_judge",
    "judge_record",
    "judgement_figures",
    "keep_judge_record",
    "probe_judge",
    "standing",
]
