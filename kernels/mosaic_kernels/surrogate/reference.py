"""The clipped surrogate in plain PyTorch autograd."""

import torch

from mosaic_kernels.dispatch import result_dtype


def reference_clipped_surrogate(
    policy_logprobs: torch.Tensor,  # [T]
    start_logprobs: torch.Tensor,  # [T]
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
    ratio = torch.exp(policy - counted(start_logprobs))
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if reference_logprobs is not None:
        difference = counted(reference_logprobs) - policy
        # expm1 keeps the digits of a small difference, where exp(d) - d - 1 cancels.
        loss = loss + kl_weight * (torch.expm1(difference) - difference)
    return weights * loss
