"""[reward]: from preferences to rewards."""

from __future__ import annotations

from mosaic_fast.config.section import NonNegative, Positive, Section


class RewardConfig(Section):
    """R = r_align + r_fmt - p_len, normalised within the group."""

    length_target: Positive = 40.0
    """L0 of p_len = max(0, (L - L0) / L0), in tokens a step; by the kind of model, 400 for others."""
    divide_by_std: bool | None = None
    """Divide centred rewards by the group's standard deviation; default: yes, but not for loss dr_grpo."""
    std_epsilon: NonNegative = 0.1
    """Added to the group's standard deviation, so that tiny differences are not blown up."""
    require_signal: bool = False
    """Stop at a step where every group is a tie or the gradient is zero, and say why."""
