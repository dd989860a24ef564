"""Agent-SafetyBench (its environments are Apache-2.0), with cases the user brings. See environment.py."""

from mosaic_rollout.environments.agent_safetybench.cases import WORLDS_VERSION
from mosaic_rollout.environments.agent_safetybench.environment import (
    AgentSafetyBenchEnvironment,
    AgentSafetyBenchEpisode,
)

__all__ = ["WORLDS_VERSION", "AgentSafetyBenchEnvironment", "AgentSafetyBenchEpisode"]
