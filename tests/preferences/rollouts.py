"""Rollouts that differ in what they say."""

from mosaic_rollout.types import Rollout
from tests.report.runs_for_tests import make_rollout


def saying(plan: str, rollout_id: int = 0, *, kind: str = "benign", observation: str = "seen") -> Rollout:
    """A rollout whose plan is the given text."""
    assert kind in ("benign", "harmful", "injected")
    return make_rollout(plan=plan, rollout_id=rollout_id, kind=kind, observation=observation)


def plan_of(trajectory: object) -> str:
    """The plan of a trajectory as a judge sees it."""
    assert isinstance(trajectory, dict)
    return trajectory["steps"][0]["plan"]
