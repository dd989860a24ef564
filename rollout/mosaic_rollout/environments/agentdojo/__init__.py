"""AgentDojo (MIT licence), a benchmark of tool use under prompt injection. See environment.py."""

from mosaic_rollout.environments.agentdojo.api import AGENTDOJO_VERSION
from mosaic_rollout.environments.agentdojo.environment import AgentDojoEnvironment, AgentDojoEpisode
from mosaic_rollout.environments.sources import EnvironmentMissing

__all__ = ["AGENTDOJO_VERSION", "AgentDojoEnvironment", "AgentDojoEpisode", "EnvironmentMissing"]
