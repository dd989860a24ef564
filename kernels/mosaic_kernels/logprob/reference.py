"""Log-probs and entropies from logits in memory: plain PyTorch autograd, O(N V) memory."""

import torch

from mosaic_kernels.dispatch import result_dtype


def reference_linear_logprob(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [E] int64
    rows: torch.Tensor,  # [E] int64
    bias: torch.Tensor | None,  # [V]
    temperature: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # [E], [N]
    """In fp32 or, for fp64 input, fp64."""
    dtype = result_dtype(hidden, weight)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    # A log-prob of -inf has probability 0 and adds 0 to the entropy, not NaN.
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(dtype).min)).sum(-1)
    return logprobs[rows, targets], entropy
