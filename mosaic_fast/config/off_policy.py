"""[off_policy]: how rollouts of another policy are weighed."""

from __future__ import annotations

from pydantic import model_validator

from mosaic_fast.config.section import NonNegative, Positive, Section


class OffPolicyConfig(Section):
    """What to do where the engine's log-probs differ from the trainer's. Default: nothing but `mismatch/`."""

    truncate_at: Positive | None = None
    """Weigh each token by the ratio trainer / engine, at most this (truncated importance sampling)."""
    mask_below: NonNegative | None = None
    """Weigh each token by that ratio, and by 0 where the ratio is below this."""
    mask_above: Positive | None = None
    """Weigh each token by that ratio, and by 0 where the ratio is above this."""

    @property
    def masks(self) -> bool:
        return self.mask_below is not None or self.mask_above is not None

    @property
    def corrects(self) -> bool:
        return self.truncate_at is not None or self.masks

    @model_validator(mode="after")
    def _contradictions(self) -> OffPolicyConfig:
        low, high = self.mask_below, self.mask_above
        if low is not None and high is not None and low >= high:
            raise ValueError(f"off_policy.mask_below ({low}) must be below off_policy.mask_above ({high})")
        return self
