"""The clipped surrogate of GRPO and its kin, one value a token."""

import torch

from mosaic_kernels.dispatch import Backends, Defaults, choose_backend
from mosaic_kernels.surrogate.reference import reference_clipped_surrogate

BACKENDS: Backends = {"reference": None, "triton": ("cuda",)}
DEFAULTS: Defaults = {"cuda": ("triton", "reference")}

__all__ = ["BACKENDS", "clipped_surrogate"]


def clipped_surrogate(
    policy_logprobs: torch.Tensor,  # [T] floating, differentiable
    old_logprobs: torch.Tensor,  # [T] floating, the policy's own at the step's start
    advantages: torch.Tensor,  # [T] floating
    weights: torch.Tensor,  # [T] floating; where 0, the other values may be anything, even NaN
    *,
    reference_logprobs: torch.Tensor | None = None,  # [T] floating, needed with kl_weight
    clip_low: float,
    clip_high: float,
    kl_weight: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:  # [T] fp32, or fp64 for fp64 policy_logprobs
    """weights (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight (exp(d) - d - 1)).

    With r = exp(policy - start), A the advantages and d = reference - policy: GRPO (Shao et al.,
    arXiv 2402.03300, equation 3), the k3 estimate of the KL divergence (its equation 4), asymmetric
    clipping (DAPO, arXiv 2503.14476). Differentiable in policy_logprobs only. A token of weight 0 has
    loss 0 and gradient 0 whatever its other values are. Backends: reference, triton (CUDA, in fp32).

    Example: three tokens whose ratio is 1, 2 and 1, A = [1, 1, -1], weights = [1, 1, 0] and clips of 0.2
    give the losses [-1, -1.2, 0].
    """
    if policy_logprobs.ndim != 1 or not policy_logprobs.is_floating_point():
        raise ValueError(
            "policy_logprobs must be floating [T], "
            f"got {policy_logprobs.dtype} {tuple(policy_logprobs.shape)}"
        )
    others = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "weights": weights,
        "reference_logprobs": reference_logprobs,
    }
    for name, values in others.items():
        if values is None:
            continue
        if values.shape != policy_logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, expected {tuple(policy_logprobs.shape)}"
            )
        if not values.is_floating_point():
            raise ValueError(f"{name} must be floating, got {values.dtype}")
        if values.device != policy_logprobs.device:
            raise ValueError(f"{name} is on {values.device}, policy_logprobs on {policy_logprobs.device}")
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must lie in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high}")
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight must be at least 0, got {kl_weight}")
    if kl_weight > 0 and reference_logprobs is None:
        raise ValueError("kl_weight needs reference_logprobs")
    reference = reference_logprobs if kl_weight > 0 else None
    if backend == "auto" and policy_logprobs.dtype == torch.float64:
        backend = "reference"
    chosen = choose_backend("clipped_surrogate", backend, policy_logprobs.device, BACKENDS, DEFAULTS)
    surrogate = reference_clipped_surrogate
    if chosen == "triton":
        from mosaic_kernels.surrogate.triton import triton_clipped_surrogate

        surrogate = triton_clipped_surrogate
    return surrogate(
        policy_logprobs, old_logprobs.detach(), advantages.detach(), weights.detach(),
        None if reference is None else reference.detach(), clip_low, clip_high, kl_weight,
    )  # fmt: skip
