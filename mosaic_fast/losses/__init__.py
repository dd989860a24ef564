"""Policy losses: pure functions of log-probs, one value a rollout token.

`loss(policy_logprobs, batch, entropy) -> (scalar, metrics)`. A loss is a sum over tokens with weights that
hold the credit and a normaliser of the whole step, known before the first micro-batch: parts add up.
"""

from __future__ import annotations

from mosaic_fast.config import LossConfig
from mosaic_fast.losses.batch import Loss, LossBatch, SumCount, normalised_weights
from mosaic_fast.losses.pairwise import PairwiseLoss
from mosaic_fast.losses.surrogate import SurrogateLoss

__all__ = [
    "Loss",
    "LossBatch",
    "PairwiseLoss",
    "SumCount",
    "SurrogateLoss",
    "build_loss",
    "normalised_weights",
]


def build_loss(config: LossConfig) -> SurrogateLoss | PairwiseLoss:
    """The loss that a configuration names."""
    settings, bonus = config.settings, config.entropy_weight
    if config.name == "dpo" or config.name == "dpo_norm" or config.name == "ipo":
        return PairwiseLoss(config.name, settings.beta, bonus)
    ratio = "sequence" if config.name == "gspo" else "detached" if config.name == "cispo" else "token"
    return SurrogateLoss(ratio, settings.clip_low, settings.clip_high, settings.kl_weight, bonus)
