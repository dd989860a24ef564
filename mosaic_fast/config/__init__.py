"""The configuration of a run: one frozen model a section, a file each. Importable without torch.

The defaults are the run of `make train`: the embedded model in the embedded world. Every field's text is what
`--help` prints.
"""

from mosaic_fast.config.config import CheckpointConfig, Config, TrackersConfig
from mosaic_fast.config.learning import (
    OWN_SETTINGS,
    PAIRWISE_LOSSES,
    ForestConfig,
    LossConfig,
    LossSettings,
    ModelConfig,
    OffPolicyConfig,
    OptimConfig,
)
from mosaic_fast.config.preferences import REWARD_PARTS, JudgeConfig, RewardConfig
from mosaic_fast.config.rollout import (
    ENVIRONMENTS,
    EVALUATION_ONLY,
    AttacksConfig,
    EngineConfig,
    EnvConfig,
    RolloutConfig,
)
from mosaic_fast.config.section import is_plain_url
from mosaic_fast.config.sft import SftConfig

__all__ = [
    "ENVIRONMENTS",
    "EVALUATION_ONLY",
    "OWN_SETTINGS",
    "PAIRWISE_LOSSES",
    "REWARD_PARTS",
    "AttacksConfig",
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
    "SftConfig",
    "TrackersConfig",
    "is_plain_url",
]
