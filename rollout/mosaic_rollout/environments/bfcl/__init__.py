"""BFCL v4 (Apache-2.0), the Berkeley Function Calling Leaderboard: benign tool use. See environment.py."""

from mosaic_rollout.environments.bfcl.api import BFCL_VERSION
from mosaic_rollout.environments.bfcl.environment import BfclEnvironment, MultiTurnEpisode, SingleTurnEpisode

__all__ = ["BFCL_VERSION", "BfclEnvironment", "MultiTurnEpisode", "SingleTurnEpisode"]
