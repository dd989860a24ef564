"""What the servers did since the last reset, as sums that add up over steps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields

from mosaic_rollout.engine.sglang.client import Sample
from mosaic_rollout.engine.stats import LAST


@dataclass
class ServingStats:
    """Sums over finished requests; of a request that was sent again, only the answer that counted."""

    completions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # as the server counts: of the prompt, found in its radix cache
    generated_tokens: int = 0
    resent: int = 0  # requests sent again after a server failed them
    restarts: int = 0
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    """Of the last LAST requests, from asking to the first token."""

    @property
    def prefix_hit_frac(self) -> float:
        """Share of the prompt tokens found in the cache, 0 without prompts."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def add(self, sample: Sample, waited_s: float) -> None:
        """waited_s: what passed between asking for it and sending it."""
        self.completions += 1
        self.prompt_tokens += sample.prompt_tokens
        self.cached_tokens += sample.cached_tokens
        self.generated_tokens += len(sample.token_ids)
        self.first_token_s.append(waited_s + sample.first_token_s)

    def reset(self) -> None:
        self.first_token_s.clear()
        for each in fields(self):
            if each.name != "first_token_s":
                setattr(self, each.name, 0)
