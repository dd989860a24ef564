"""Log-probs and entropies straight from hidden states: the LM head without its logits in memory."""

from typing import Literal, overload

import torch

from mosaic_kernels.attention.tiles import architecture_of
from mosaic_kernels.dispatch import Backends, Defaults, IndexLike, as_index, choose_backend
from mosaic_kernels.logprob.chunked import chunked_linear_logprob
from mosaic_kernels.logprob.reference import reference_linear_logprob
from mosaic_kernels.logprob.tiles import missing_tile

BACKENDS: Backends = {"reference": None, "chunked": None, "triton": ("cuda",)}
DEFAULTS: Defaults = {"cpu": ("chunked",), "cuda": ("triton", "chunked")}

__all__ = ["BACKENDS", "linear_logprob"]


@overload
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: IndexLike,
    *,
    rows: IndexLike | None = ...,
    bias: torch.Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    scale: float = ...,
    return_entropy: Literal[False] = ...,
    backend: str = ...,
) -> torch.Tensor: ...
@overload
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: IndexLike,
    *,
    rows: IndexLike | None = ...,
    bias: torch.Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    scale: float = ...,
    return_entropy: Literal[True],
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def linear_logprob(
    hidden: torch.Tensor,  # [N, D] floating
    weight: torch.Tensor,  # [V, D] floating, the LM head
    targets: IndexLike,  # [E] int in [0, V)
    *,
    rows: IndexLike | None = None,  # [E] int in [0, N): the row that predicts each target; None: E = N
    bias: torch.Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    return_entropy: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # [E] (, [N]) fp32, or fp64 for fp64 input
    """log softmax(logits / temperature)[rows, targets], and the entropy of every row.

        logits = scale (hidden weight^T + bias); a softcap c bends them to c tanh(logits / c) first (Gemma 2,
    arXiv 2408.00118, section 2). Both results are differentiable in hidden, weight and bias. A row with
    several targets (a fork of the forest) has its logsumexp computed once. Backends: reference (logits in
    memory), chunked (a chunk of rows at a time, logits computed again in the backward pass), triton (CUDA:
    bf16, fp16 and fp32). auto: chunked on CPU, for fp64 and where triton has no tile, triton on CUDA.

        Example: a fork after two tokens predicts nodes 2 and 3 from row 1: rows = [0, 1, 1],
        targets = tokens[1:4].
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D]; got {tuple(hidden.shape)}, {tuple(weight.shape)}"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"hidden and weight must be floating; got {hidden.dtype}, {weight.dtype}")
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: there is no probability over an empty vocabulary")
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, weight has {weight.shape[0]} rows")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 (None for no cap), got {softcap}")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    # c tanh(scale z / c) / temperature = (c / scale) tanh(z / (c / scale)) / (temperature / scale)
    temperature, softcap = temperature / scale, None if softcap is None else softcap / scale
    target_index = as_index("targets", targets, hidden.device, below=weight.shape[0])
    if target_index.ndim != 1:
        raise ValueError(f"targets must be one-dimensional, got shape {tuple(target_index.shape)}")
    if rows is None:
        if len(target_index) != hidden.shape[0]:
            raise ValueError(f"{len(target_index)} targets for {hidden.shape[0]} rows of hidden: pass rows=")
        row_index = torch.arange(hidden.shape[0], device=hidden.device)
    else:
        row_index = as_index("rows", rows, hidden.device, below=hidden.shape[0])
        if row_index.shape != target_index.shape:
            raise ValueError(f"rows has shape {tuple(row_index.shape)}, targets {tuple(target_index.shape)}")
    if backend == "auto" and torch.float64 in (hidden.dtype, weight.dtype):
        backend = "chunked"
    chosen = choose_backend(
        "linear_logprob", backend, hidden.device, BACKENDS, DEFAULTS,
        lambda name: _obstacle(name, hidden, weight),
    )  # fmt: skip
    if chosen == "chunked":
        logprobs, entropy = chunked_linear_logprob(
            hidden, weight, target_index, row_index, bias, temperature, return_entropy, softcap
        )
    elif chosen == "triton":
        from mosaic_kernels.logprob.triton import triton_linear_logprob

        logprobs, entropy = triton_linear_logprob(
            hidden, weight, target_index, row_index, bias, temperature, return_entropy, softcap
        )
    else:
        logprobs, entropy = reference_linear_logprob(
            hidden, weight, target_index, row_index, bias, temperature, softcap
        )
    return (logprobs, entropy) if return_entropy and entropy is not None else logprobs


def _obstacle(name: str, hidden: torch.Tensor, weight: torch.Tensor) -> str:
    """What keeps a backend from computing this, "" for nothing."""
    if name != "triton":
        return ""
    return missing_tile(architecture_of(hidden.device), torch.promote_types(hidden.dtype, weight.dtype))
