"""The judge compares the rollouts of a group pair by pair (MOSAIC, arXiv 2603.03205)."""

from mosaic_fast.judge.contract import Judge, Judgement
from mosaic_fast.judge.figures import judgement_figures
from mosaic_fast.judge.load import build_judge
from mosaic_fast.judge.record import judge_record, keep_judge_record, probe_judge
from mosaic_fast.judge.rule import RuleJudge, standing

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
