"""Log-probs of a forest's trained edges from the last hidden states, one a distinct edge."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mosaic_fast.policy.forest_tensors import ForestTensors
from mosaic_fast.policy.layout import is_plain_linear
from mosaic_kernels import linear_logprob

MAX_LOGITS = 2**25
"""Logits in memory at once where the LM head has to be called as a module (fp32: 128 MiB)."""


def head_logprobs(
    head: nn.Module,
    hidden: Tensor,  # [N, D]
    forest: ForestTensors,
    *,
    vocab_size: int,
    temperature: float,
    return_entropy: bool,
) -> tuple[Tensor, Tensor | None]:  # [E], [N]
    """From the LM head's matrix where that is all it is; else through the module, a chunk of rows at a time.

    A chunk's logits are computed again in the backward pass, so hooks on the head run twice in training.
    """
    if is_plain_linear(head):
        matrix, targets, rows = head.weight, forest.targets, forest.edge_rows
        if return_entropy:
            return linear_logprob(
                hidden,
                matrix,
                targets,
                rows=rows,
                bias=head.bias,
                temperature=temperature,
                return_entropy=True,
            )
        return linear_logprob(
            hidden, matrix, targets, rows=rows, bias=head.bias, temperature=temperature
        ), None

    def run(rows: Tensor, targets: Tensor, edge_rows: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs_from_logits(head(rows[None])[0], targets, edge_rows, temperature)

    chunk = max(1, MAX_LOGITS // vocab_size)
    if len(hidden) <= chunk:
        return run(hidden, forest.targets, forest.edge_rows)
    starts = torch.arange(0, len(hidden) + chunk, chunk, device=hidden.device)
    edges = torch.searchsorted(forest.edge_rows, starts).tolist()  # edges are ordered by row
    results = []
    for start, first, last in zip(starts.tolist()[:-1], edges[:-1], edges[1:], strict=True):
        arguments = (
            hidden[start : start + chunk],
            forest.targets[first:last],
            forest.edge_rows[first:last] - start,
        )
        results.append(checkpoint(run, *arguments, use_reentrant=False))
    logprobs, entropy = zip(*results, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def logprobs_from_logits(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [E] int64
    edge_rows: Tensor,  # [E] int64 in [0, N)
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [E], [N] fp32, or fp64 for fp64 logits
    """Log-probs of the targets and the entropy of every row, at the temperature."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)
    # A token of log-prob -inf has probability 0 and adds 0 to the entropy, not NaN.
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(dtype).min)).sum(-1)
    return logprobs[edge_rows, targets], entropy
