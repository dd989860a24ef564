"""BFCL v4 (Apache-2.0), the Berkeley Function Calling Leaderboard: benign tool use. See environment.py."""

from mosaic_rollout.environments.bfcl.api import BFCL_VERSION
from mosaic_rollout.environments.bfcl.environment import BfclEnvironment
from mosaic_rollout.environments.bfcl.multi_turn import MultiTurnEpisode
from mosaic_rollout.environments.bfcl.single_turn import SingleTurnEpisode

__all__ = ["BFCL_VERSION", "BfclEnvironment", "MultiTurnEpisode", "SingleTurnEpisode"]
