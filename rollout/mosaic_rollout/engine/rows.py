"""Keys and values of the sequences being sampled: one row each, contiguous, so that decoding gathers nothing.

Rows 0..n-1 are in use. A row that leaves is overwritten by the last one, a longer sequence makes the buffer
grow by half: per token, the copying amounts to a constant.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from .adapter import KeyValueShape
from .pool import KeyValuePool

_TOKENS_MULTIPLE = 64


class RowBuffer(Cache):
    """Row buffers and, at once, the transformers cache of a decode step."""

    def __init__(self, shape: KeyValueShape) -> None:
        super().__init__(layers=[])
        self.shape = shape
        self.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self.rows = self.capacity = 0
        self.keys, self.values = self.shape.empty(0, 0)  # [layers, rows, capacity, Hkv * D]
        self._index_views()

    def reserve(self, rows: int, tokens: int) -> None:
        """Make place for `rows` rows of `tokens` tokens, keeping what is there."""
        if rows <= self.rows and tokens <= self.capacity:
            return
        old_rows, old_capacity = self.rows, self.capacity
        if rows > old_rows:
            self.rows = max(rows, old_rows + old_rows // 2)
        if tokens > old_capacity:
            self.capacity = (
                -(-max(tokens, old_capacity + old_capacity // 2) // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE
            )
        keys, values = self.shape.empty(self.rows, self.capacity)
        keys[:, :old_rows, :old_capacity], values[:, :old_rows, :old_capacity] = self.keys, self.values
        self.keys, self.values = keys, values
        self._index_views()

    def load(self, row: int, pool: KeyValuePool, slots: torch.Tensor) -> None:
        """Fill a row's first tokens from the pool; slots [L] int64."""
        self.keys[:, row, : len(slots)] = pool.keys[:, slots]
        self.values[:, row, : len(slots)] = pool.values[:, slots]

    def store(self, row: int, start: int, pool: KeyValuePool, slots: torch.Tensor) -> None:
        """Write a row's tokens from `start` on to the pool; slots [L] int64."""
        pool.keys[:, slots] = self.keys[:, row, start : start + len(slots)]
        pool.values[:, slots] = self.values[:, row, start : start + len(slots)]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of one row over another."""
        self.keys[:, target, :tokens] = self.keys[:, source, :tokens]
        self.values[:, target, :tokens] = self.values[:, source, :tokens]

    def begin_step(self, positions: torch.Tensor) -> int:
        """Set the places [n] of the next update; returns K, the keys it will show."""
        self._active = len(positions)
        self._visible = int(positions.max()) + 1
        self._places = torch.arange(self._active, device=positions.device) * self.capacity + positions
        return self._visible

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, Hkv, 1, D] new -> [n, Hkv, K, D], for keys and values."""
        flat_keys, keys, flat_values, values = self._views[layer_idx]
        flat_keys.index_copy_(0, self._places, key_states.reshape(self._active, -1))
        flat_values.index_copy_(0, self._places, value_states.reshape(self._active, -1))
        return keys[: self._active, :, : self._visible], values[: self._active, :, : self._visible]

    def _index_views(self) -> None:
        """Per layer, the buffer as [rows * capacity, Hkv * D] to write, [rows, Hkv, capacity, D] to read."""
        self._views = []
        for keys, values in zip(self.keys, self.values, strict=True):
            views = []
            for stored, dim in ((keys, self.shape.key_dim), (values, self.shape.value_dim)):
                by_head = stored.unflatten(-1, (self.shape.heads, dim)).transpose(1, 2)
                views += [stored.flatten(0, 1), by_head]
            self._views.append(tuple(views))
