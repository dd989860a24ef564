"""The embedded world: a small office with files, mail, money, a web search and channels.

Tasks are benign, harmful, or benign with an order injected into a tool's output. They are composed from a
grammar whose held-out wordings and values neither the cold start nor reinforcement learning ever sees.
"""

from mosaic_rollout.environments.world.environment import WorldEnvironment, WorldEpisode
from mosaic_rollout.environments.world.tasks import WorldTask

__all__ = ["WorldEnvironment", "WorldEpisode", "WorldTask"]
