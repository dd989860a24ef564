"""[loss]: the policy loss, and the settings each loss has of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mosaic_fast.config.section import NonNegative, Positive, Section

LossName = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "dpo", "dpo_norm", "ipo"]
PAIRWISE_LOSSES = ("dpo", "dpo_norm", "ipo")


@dataclass(frozen=True)
class LossSettings:
    """The settings of a loss in full: its own, where the configuration leaves them open."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalisation: Literal["token", "sequence", "constant"] = "token"
    kl_weight: float = 0.0
    beta: float = 0.1


OWN_SETTINGS: dict[LossName, LossSettings] = {
    "grpo": LossSettings(kl_weight=0.01),
    "dapo": LossSettings(clip_high=0.28),
    "dr_grpo": LossSettings(normalisation="constant"),
    "gspo": LossSettings(clip_low=3e-4, clip_high=4e-4, normalisation="sequence"),
    "cispo": LossSettings(clip_low=1.0, clip_high=4.0),
    "dpo": LossSettings(),
    "dpo_norm": LossSettings(beta=5.0),
    "ipo": LossSettings(),
}


class LossConfig(Section):
    """The policy loss."""

    name: LossName = "grpo"
    """On rewards: grpo, dapo, dr_grpo, gspo, cispo. On judged pairs: dpo, dpo_norm, ipo (docs/method.md)."""
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The ratio is clipped below 1 - clip_low; default 0.2, gspo 0.0003, cispo 1 (never)."""
    clip_high: Positive | None = None
    """The ratio is clipped above 1 + clip_high; default 0.2, dapo 0.28, gspo 0.0004, cispo 4."""
    normalisation: Literal["token", "sequence", "constant"] | None = None
    """What sums over tokens are divided by: token, sequence (default of gspo) or constant (of dr_grpo)."""
    kl_weight: NonNegative | None = None
    """Weight of the k3 estimate of the KL divergence to the reference; default 0.01 for grpo, else 0."""
    entropy_weight: NonNegative = 0.0
    """Weight of the policy's mean entropy, as a bonus."""
    beta: Positive | None = None
    """Pairwise losses: how closely the reference is kept; default 0.1, dpo_norm 5."""

    @property
    def is_pairwise(self) -> bool:
        return self.name in PAIRWISE_LOSSES

    @property
    def needs_reference(self) -> bool:
        return self.is_pairwise or self.settings.kl_weight > 0

    @property
    def settings(self) -> LossSettings:
        """What is configured, and the loss's own where it is not."""
        own = OWN_SETTINGS[self.name]
        chosen = {name: getattr(self, name) for name in asdict(own) if getattr(self, name) is not None}
        return replace(own, **chosen)

    @model_validator(mode="after")
    def _contradictions(self) -> LossConfig:
        unread = ["clip_low", "clip_high", "normalisation", "kl_weight"] if self.is_pairwise else ["beta"]
        for name in unread:
            if getattr(self, name):
                raise ValueError(f"loss.{name} has no meaning for loss.name = {self.name!r}; leave it out")
        return self
