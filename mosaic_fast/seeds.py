"""Seeds of a run's parts, each a pure function of the run's seed, a purpose and a step."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, purpose: str, step: int) -> int:
    """A seed in [0, 2**62) that is independent for every (seed, purpose, step)."""
    digest = hashlib.sha256(f"{seed}|{purpose}|{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2
