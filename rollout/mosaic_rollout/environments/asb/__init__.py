"""Agent Security Bench (MIT licence): tool use under prompt injection. See environment.py."""

from mosaic_rollout.environments.asb.cases import ASB_VERSION
from mosaic_rollout.environments.asb.environment import AsbEnvironment, AsbEpisode

__all__ = ["ASB_VERSION", "AsbEnvironment", "AsbEpisode"]
