"""Agent-SafetyBench (its environments are Apache-2.0), with cases the user brings. See environment.py."""

from mosaic_rollout.environments.agent_safetybench.environment import AgentSafetyBenchEnvironment
from mosaic_rollout.environments.agent_safetybench.episode import AgentSafetyBenchEpisode
from mosaic_rollout.environments.agent_safetybench.worlds import WORLDS_VERSION

__all__ = ["WORLDS_VERSION", "AgentSafetyBenchEnvironment", "AgentSafetyBenchEpisode"]
