"""What the engine did since the last reset, as sums that add up over steps and engines."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

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
    prefill_forwards: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    peak_cached_tokens: int = 0
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    """Of the last LAST completions, from asking to the first token."""

    @property
    def prefix_hit_frac(self) -> float:
        """Share of the prompt tokens that were not computed again, 0 without prompts."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def reset(self) -> None:
        for name, value in vars(EngineStats()).items():
            setattr(self, name, value)
