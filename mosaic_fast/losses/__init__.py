"""Policy losses: pure functions of log-probs, one value a rollout token. Importable without torch.

To add a loss, write one file with a class (see `Loss` for what it declares) and name it in LOSSES.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from mosaic_fast.errors import UserError
from mosaic_fast.losses.batch import Couples, Loss, LossBatch, Normalisation, SumCount
from mosaic_fast.losses.credit import normalised_weights
from mosaic_fast.losses.pairwise import PairwiseLoss
from mosaic_fast.losses.surrogate import SurrogateLoss

if TYPE_CHECKING:
    from mosaic_fast.config import Config, LossConfig

__all__ = [
    "LOSSES",
    "Couples",
    "Loss",
    "LossBatch",
    "Normalisation",
    "PairwiseLoss",
    "SumCount",
    "SurrogateLoss",
    "build_loss",
    "check_loss",
    "loss_class",
    "normalised_weights",
]

LOSSES: Mapping[str, str] = {
    "grpo": "mosaic_fast.losses.surrogate:GRPO",
    "dapo": "mosaic_fast.losses.surrogate:DAPO",
    "dr_grpo": "mosaic_fast.losses.surrogate:DrGRPO",
    "gspo": "mosaic_fast.losses.surrogate:GSPO",
    "cispo": "mosaic_fast.losses.surrogate:CISPO",
    "dpo": "mosaic_fast.losses.pairwise:DPO",
    "dpo_norm": "mosaic_fast.losses.pairwise:DPONorm",
    "ipo": "mosaic_fast.losses.pairwise:IPO",
    "sft": "mosaic_fast.losses.sft:SFT",
}
"""Names of `loss.name` beside module:Class, and the class that each stands for."""


@cache
def loss_class(name: str) -> type[Loss]:
    """The class that a name of LOSSES stands for."""
    module, _, class_name = LOSSES[name].partition(":")
    return getattr(import_module(module), class_name)


def check_loss(config: Config) -> None:
    """UserError for a user's own loss that cannot be used, or not with the rest of the configuration."""
    if config.loss.is_own and (wrong := config.wrong_for_loss(build_loss(config.loss).pairwise)):
        raise UserError(wrong)


def build_loss(config: LossConfig) -> Loss:
    """The loss that a configuration names. UserError for a user's own that cannot be used."""
    if config.is_own:
        from mosaic_fast.losses.own_loss import load_loss

        return load_loss(config)
    return loss_class(config.name)(**config.own_settings)
