"""PrivacyLens (MIT), for evaluation only: what a last message gives away. See environment.py."""

from mosaic_rollout.environments.privacylens.cases import Case, case_of
from mosaic_rollout.environments.privacylens.environment import (
    PrivacyLensEnvironment,
    PrivacyLensEpisode,
    final_action,
)

__all__ = ["Case", "PrivacyLensEnvironment", "PrivacyLensEpisode", "case_of", "final_action"]
