"""The clipped surrogate in plain PyTorch autograd."""

import torch

from mosaic_kernels.dispatch import result_dtype


def reference_clipped_surrogate(
    policy_logprobs: torch.Tensor,  # [T]
    old_logprobs: torch.Tensor,  # [T]
    advantages: torch.Tensor,  # [T]
    weights: torch.Tensor,  # [T]
    reference_logprobs: torch.Tensor | None,  # [T] None: no KL term
    clip_low: float,
    clip_high: float,
    kl_weight: float,
) -> torch.Tensor:  # [T]
    """Values of weight 0 are replaced before anything is computed: a NaN there would survive a product."""
    dtype = result_dtype(policy_logprobs)
    weights = weights.to(dtype)

    def counted(values: torch.Tensor) -> torch.Tensor:
        return torch.where(weights == 0, 0.0, values.to(dtype))

    policy, advantages = counted(policy_logprobs), counted(advantages)
    log_ratio = policy - counted(old_logprobs)
    ratio = log_ratio.detach().exp()
    above = (advantages >= 0) & (ratio > 1 + clip_high)
    below = (advantages <= 0) & (ratio < 1 - clip_low)
    # There the bound counts, and the ratio never enters exp, whose gradient 0 * inf would be NaN.
    bound = torch.ones_like(ratio).masked_fill(below, 1 - clip_low).masked_fill(above, 1 + clip_high)
    free = torch.exp(torch.where(above | below, 0.0, log_ratio))
    loss = -advantages * (free * bound)
    if reference_logprobs is not None:
        difference = counted(reference_logprobs) - policy
        # expm1 keeps the digits of a small difference, where exp(d) - d - 1 cancels.
        loss = loss + kl_weight * (torch.expm1(difference) - difference)
    return weights * loss
