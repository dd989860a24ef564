"""How far the policy that sampled is from the one that trains, and what to do about it.

The engine and the trainer compute log-probs with different kernels, and an overlapping run samples with
older weights. The correction multiplies the advantages alone: clipped ratio, KL term and normaliser stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosaic_fast.config import OffPolicyConfig


def importance(old_logprobs: Tensor, rollout_logprobs: Tensor, config: OffPolicyConfig) -> Tensor:
    """What each token's advantage is multiplied by. [N], [N] -> [N], without gradient.

    With w = exp(start - sampler): min(w, truncate_at), truncated importance sampling (Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"), and 0 where w lies outside
    [mask_below, mask_above], as in IcePop (Ling team, arXiv 2510.18855).

    Example: w of 0.5, 1 and 4 with truncate_at = 2 and mask_below = 0.6 give 0, 1 and 2.
    """
    ratio = torch.exp((old_logprobs - rollout_logprobs).detach())
    weight = ratio if config.truncate_at is None else ratio.clamp(max=config.truncate_at)
    return torch.where(_masked(ratio, config), 0.0, weight)


def mismatch_figures(
    old_logprobs: Tensor,  # [T]
    rollout_logprobs: Tensor,  # [T]
    counted: Tensor,  # [T] bool
    config: OffPolicyConfig,
) -> dict[str, float]:
    """KL(sampler || trainer) by the k3 estimate, mean and largest ratio, before anything is truncated."""
    difference = (old_logprobs - rollout_logprobs)[counted].double()
    difference = difference[torch.isfinite(difference)]
    if not len(difference):
        return {"mismatch/kl": 0.0, "mismatch/ratio_mean": 1.0, "mismatch/ratio_max": 1.0}
    ratio = difference.exp()
    figures = {
        "mismatch/kl": float((ratio - 1.0 - difference).mean()),
        "mismatch/ratio_mean": float(ratio.mean()),
        "mismatch/ratio_max": float(ratio.max()),
    }
    if config.truncate_at is not None:
        figures["mismatch/truncated_frac"] = float((ratio > config.truncate_at).double().mean())
    if config.masks:
        figures["mismatch/masked_frac"] = float(_masked(ratio, config).double().mean())
    return figures


def _masked(ratio: Tensor, config: OffPolicyConfig) -> Tensor:
    masked = torch.zeros_like(ratio, dtype=torch.bool)
    if config.mask_below is not None:
        masked |= ratio < config.mask_below
    if config.mask_above is not None:
        masked |= ratio > config.mask_above
    return masked
