"""Storage of cached keys and values, token by token: the radix tree holds slot numbers, the pool what is in
them.

The idea of SGLang's token-to-KV pool (Zheng et al., "SGLang: Efficient Execution of Structured Language
Model Programs", 2024): with one slot a token, splitting a tree node moves no memory, evicting one frees all
it held, and the keys of any path are one gather.
"""

from __future__ import annotations

import numpy as np

from mosaic_rollout.engine.adapter import KeyValueShape

_FIRST_SLOTS = 1024


class KeyValuePool:
    """Slots of keys and values, growing by doubling; `keys` [layers, Hkv, slots, Dk], `values` likewise."""

    def __init__(self, shape: KeyValueShape) -> None:
        self.shape = shape
        self.clear()

    def clear(self, *, release: bool = True) -> None:
        """Forget everything; the memory is given back, or kept for the next use without `release`."""
        if release:
            self.keys, self.values = self.shape.allocate(0)
        self._free = np.arange(self.keys.shape[2] - 1, -1, -1)  # a stack: its end is handed out first
        self.used = 0

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def allocate(self, count: int) -> np.ndarray:
        """`count` free slots, [count] int64."""
        if count > len(self._free):
            self._grow(self.used + count)
        cut = len(self._free) - count
        slots, self._free = self._free[cut:][::-1].copy(), self._free[:cut]
        self.used += count
        return slots

    def release(self, slots: np.ndarray) -> None:
        self._free = np.concatenate([self._free, slots[::-1]])
        self.used -= len(slots)

    def _grow(self, needed: int) -> None:
        old = self.keys.shape[2]
        new = max(needed, 2 * old, _FIRST_SLOTS)
        keys, values = self.shape.allocate(new)
        keys[:, :, :old], values[:, :, :old] = self.keys, self.values
        self.keys, self.values = keys, values
        self._free = np.concatenate([np.arange(new - 1, old - 1, -1), self._free])
