"""What every engine has: its errors, its figures, and what a request must be."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from mosaic_rollout.types import Request


class EngineError(RuntimeError):
    """The engine failed while requests were in flight; every one of them gets this error.

    The cause is chained (`__cause__`). The engine has emptied its state and serves the next request.
    """


class NonFiniteLogitsError(EngineError):
    """The model gave NaN or +inf: the weights are broken, so sampling on would only hide it."""


LAST = 100_000


@dataclass
class EngineStats:
    """Sums since the last `reset`, except `peak_cached_tokens`, a maximum.

    Of a request's prompt of L tokens, `cached_tokens` were found in the radix tree or are being computed
    for an earlier request, the others are computed for it: the last one, always, as the first decoded
    input, the rest by prefill. So prompt_tokens = cached_tokens + computed_prefill_tokens + completions,
    once all is finished.
    """

    completions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_prefill_tokens: int = 0
    generated_tokens: int = 0
    decode_iterations: int = 0
    peak_cached_tokens: int = 0
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    """Of the last LAST completions, from asking to the first token."""

    def reset(self) -> None:
        for name, value in vars(EngineStats()).items():
            setattr(self, name, value)


def validate_request(index: int, request: Request, vocab_size: int, max_tokens: int) -> None:
    """ValueError that names the `index`-th request and what is wrong with it.

    max_tokens: longest sequence, prompt and completion together, that the model serves.
    """
    tokens, sampling = request.token_ids, request.sampling
    prefix = f"request {index}:"
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{prefix} token_ids must be a 1-D integer array, got {tokens.dtype} {tokens.shape}")
    if len(tokens) == 0:
        raise ValueError(f"{prefix} empty prompt, at least one token is needed")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise ValueError(f"{prefix} token id {bad} is outside the vocabulary of {vocab_size}")
    if sampling.max_new_tokens < 1:
        raise ValueError(f"{prefix} max_new_tokens must be at least 1, got {sampling.max_new_tokens}")
    if not 0.0 <= sampling.temperature < float("inf"):
        raise ValueError(f"{prefix} temperature must be finite and at least 0, got {sampling.temperature}")
    if not 0.0 < sampling.top_p <= 1.0:
        raise ValueError(f"{prefix} top_p must be above 0 and at most 1, got {sampling.top_p}")
    if request.rollout_key < 0:
        raise ValueError(f"{prefix} rollout_key must not be negative, got {request.rollout_key}")
    total = len(tokens) + sampling.max_new_tokens
    if total > max_tokens:
        raise ValueError(
            f"{prefix} {len(tokens)} prompt tokens + max_new_tokens {sampling.max_new_tokens} = {total}, "
            f"more than the {max_tokens} of max_position_embeddings"
        )
