"""AgentHarm (MIT with a safety-only clause), for evaluation only. See environment.py."""

from mosaic_rollout.environments.agentharm.environment import (
    AgentHarmEnvironment,
    AgentHarmEpisode,
    Behaviour,
    behaviour_of,
)
from mosaic_rollout.environments.agentharm.grading import (
    PASS_OR_FAIL,
    AskJudge,
    GraderFailed,
    Grades,
    grade,
)
from mosaic_rollout.environments.agentharm.package import INSPECT_EVALS_VERSION

__all__ = [
    "INSPECT_EVALS_VERSION",
    "PASS_OR_FAIL",
    "AgentHarmEnvironment",
    "AgentHarmEpisode",
    "AskJudge",
    "Behaviour",
    "GraderFailed",
    "Grades",
    "behaviour_of",
    "grade",
]
