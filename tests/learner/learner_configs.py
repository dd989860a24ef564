"""Configurations and references of the learner's exactness tests."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from mosaic_fast.config import (
    PAIRWISE_LOSSES,
    Config,
    ForestConfig,
    LossConfig,
    OffPolicyConfig,
    OptimConfig,
    RolloutConfig,
)


def config_of(
    name: str, credit: str = "sum", *, penalised: bool = True, off_policy: OffPolicyConfig | None = None
) -> Config:
    """penalised: with KL (where the loss has one) and entropy terms, so that every token counts."""
    kl_weight = 0.1 if penalised and name not in PAIRWISE_LOSSES else None if name in PAIRWISE_LOSSES else 0.0
    return Config.model_validate(
        {
            "rollout": RolloutConfig(
                max_rollout_tokens=24, max_step_tokens=8, temperature=0.7, branching="fork_at_step"
            ),
            "forest": ForestConfig.model_validate({"tokens_per_microbatch": 24, "credit": credit}),
            "loss": LossConfig.model_validate(
                {"name": name, "kl_weight": kl_weight, "entropy_weight": 0.05 if penalised else 0.0}
            ),
            "off_policy": off_policy or OffPolicyConfig(),
            "optim": OptimConfig(epochs=2, grad_clip=1e9, lr=0.01),
        }
    )


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """Another policy of the same shape: the reference."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other.requires_grad_(False)
