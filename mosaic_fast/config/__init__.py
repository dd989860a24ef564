"""The configuration of a run: one frozen model a section, a file each. Importable without torch.

The defaults are the run of `make train`: the embedded model in the embedded world. Every field's text is what
`--help` prints.
"""

from mosaic_fast.config.checkpoint import CheckpointConfig
from mosaic_fast.config.engine import EngineConfig
from mosaic_fast.config.env import ENVIRONMENTS, EVALUATION_ONLY, EnvConfig
from mosaic_fast.config.forest import ForestConfig
from mosaic_fast.config.judge import JudgeConfig
from mosaic_fast.config.loss import OWN_SETTINGS, PAIRWISE_LOSSES, LossConfig, LossSettings
from mosaic_fast.config.model import ModelConfig
from mosaic_fast.config.off_policy import OffPolicyConfig
from mosaic_fast.config.optim import OptimConfig
from mosaic_fast.config.reward import RewardConfig
from mosaic_fast.config.rollout import RolloutConfig
from mosaic_fast.config.trackers import TrackersConfig
from mosaic_fast.config.url import is_plain_url
from mosaic_fast.config.whole import Config

__all__ = [
    "ENVIRONMENTS",
    "EVALUATION_ONLY",
    "OWN_SETTINGS",
    "PAIRWISE_LOSSES",
    "CheckpointConfig",
    "Config",
    "EngineConfig",
    "EnvConfig",
    "ForestConfig",
    "JudgeConfig",
    "LossConfig",
    "LossSettings",
    "ModelConfig",
    "OffPolicyConfig",
    "OptimConfig",
    "RewardConfig",
    "RolloutConfig",
    "TrackersConfig",
    "is_plain_url",
]
