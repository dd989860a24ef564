"""Storage of cached keys and values, token by token: the radix tree holds slot numbers, the pool what is in
them.

The idea of SGLang's token-to-KV pool (Zheng et al., "SGLang: Efficient Execution of Structured Language
Model Programs", 2024): with one slot a token, splitting a tree node moves no memory, evicting one frees all
it held, and the keys of any path are one gather.

Keys and values of the sequences being sampled: one row each, contiguous, so that decoding gathers nothing.

Rows 0..n-1 are in use. A row that leaves is overwritten by the last one, a longer sequence makes the buffer
grow by half: per token, the copying amounts to a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from mosaic_rollout.engine.adapter import KeyValueShape
from mosaic_rollout.engine.attention import Scores, grouped_attention, visible_keys
from mosaic_rollout.engine.recurrent import States
from mosaic_rollout.engine.segments import Segments
from mosaic_rollout.engine.shared_keys import SharedKeys, cuts_of

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
        self.used = self.kept_states = 0  # tokens; nodes of the tree that have states of recurrent layers

    @property
    def filled(self) -> int:
        """Tokens, and those whose keys and values would take the memory of the states."""
        return self.used + self.kept_states * self.shape.state_tokens

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


_TOKENS_MULTIPLE = 64
_SCORES = 2**24  # in memory at a time: 64 MiB of fp32


class RowBuffer:
    """Row buffers and, at once, the `Attend` of a decode step."""

    def __init__(self, shape: KeyValueShape) -> None:
        self.shape = shape
        # elsewhere products of half precision would round the scores, or calls cost more than reading
        self._explicit = shape.device.type == "cpu" and shape.dtype in (torch.float32, torch.float64)
        self._segments: dict[int, Segments] = {}  # by the number of rows
        self.release()

    def release(self) -> None:
        """Give the memory back."""
        self.rows = self.capacity = self._active = 0
        self._shared: SharedKeys | None = None
        self.keys, self.values = self.shape.allocate(0, 0)  # [layers, rows, Hkv, capacity, D]
        self._states: dict[int, States] = {}  # of recurrent layers, [rows, ...]
        self._index()

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
        keys, values = self.shape.allocate(self.rows, self.capacity)
        # masked places are read: their probability is 0, but 0 * NaN is NaN
        keys.zero_()
        values.zero_()
        keys[:, :old_rows, :, :old_capacity] = self.keys
        values[:, :old_rows, :, :old_capacity] = self.values
        self.keys, self.values = keys, values
        self._index()

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def load(self, row: int, pool: KeyValuePool, slots: torch.Tensor) -> None:
        """Fill a row's first tokens from the pool; slots [L] int64."""
        self._shared = None
        self.keys[:, row, :, : len(slots)] = pool.keys.index_select(2, slots)
        self.values[:, row, :, : len(slots)] = pool.values.index_select(2, slots)

    def save(self, row: int, start: int, pool: KeyValuePool, slots: torch.Tensor) -> None:
        """Write a row's tokens from `start` on to the pool; slots [L] int64."""
        pool.keys.index_copy_(2, slots, self.keys[:, row, :, start : start + len(slots)])
        pool.values.index_copy_(2, slots, self.values[:, row, :, start : start + len(slots)])

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of one row over another."""
        self._shared = None
        self.keys[:, target, :, :tokens] = self.keys[:, source, :, :tokens]
        self.values[:, target, :, :tokens] = self.values[:, source, :, :tokens]
        for states in self._states.values():
            for x in states:
                x[target] = x[source]

    def load_states(self, row: int, states: Mapping[int, States]) -> None:
        """Have a row, the last one, begin with the states [1, ...] of recurrent layers."""
        before = self._states
        self._states = {
            layer: tuple(torch.cat([old[:row], x]) for old, x in zip(before[layer], new, strict=True))
            if row
            else tuple(x.clone() for x in new)
            for layer, new in states.items()
        }

    def row_states(self, row: int) -> dict[int, States]:
        """A copy of the states of a row, [1, ...] each."""
        return {layer: tuple(x[row : row + 1].clone() for x in all_) for layer, all_ in self._states.items()}

    @property
    def wants_states(self) -> bool:
        return True

    @property
    def segments(self) -> Segments:
        """Each row's token alone."""
        if self._active not in self._segments:
            self._segments[self._active] = Segments.of(np.full(self._active, -1), self.shape.device)
        return self._segments[self._active]

    def begin(self, layer: int) -> States:
        return tuple(x[: self._active] for x in self._states[layer])

    def end(self, layer: int, left: States) -> None:
        self._states[layer] = left

    def begin_step(self, positions: torch.Tensor, prefixes: Sequence[np.ndarray]) -> None:
        """Each of the first n rows gets one more token, at positions [n] int64.

        prefixes: a row's tokens [L_i] int64 whose keys were loaded; rows that share them read them once.
        """
        if self._active != len(positions):
            self._shared = None
        self._active, self._prefixes = len(positions), prefixes
        self._positions = positions
        self._visible = int(positions.max()) + 1
        self._equal = int(positions.min()) + 1 == self._visible
        first = self._lines[: self._active]  # [n, Hkv]
        self._places = (first + positions[:, None]).flatten()
        self._masks: dict[tuple[int | None, int | None], torch.Tensor | None] = {}

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """[n, Hkv, D] to the rows' places."""
        keys, values = self._layers[layer]
        keys.flatten(0, 2).index_copy_(0, self._places, key.flatten(0, 1))
        values.flatten(0, 2).index_copy_(0, self._places, value.flatten(0, 1))

    def attend(self, layer: int, query: torch.Tensor, scores: Scores) -> torch.Tensor:
        """[n, Hq, D] -> [n, Hq, Dv]. Heads that share keys are the queries of one, so nothing is repeated."""
        keys, values = self._layers[layer]
        keys, values = keys[: self._active, :, : self._visible], values[: self._active, :, : self._visible]
        if scores.softcap is not None or scores.sinks is not None:
            return grouped_attention(query[:, :, None], keys, values, self._mask(scores), scores).squeeze(2)
        grouped, scale = query.unflatten(1, (self.shape.heads, -1)), scores.scale  # [n, Hkv, Hq / Hkv, D]
        if (
            self._explicit
            and scores.see_all(self._visible)
            and query[..., 0].numel() * self._visible <= _SCORES
        ):
            shared = self._share(grouped.shape[2])
            mask = self._mask(scores, shared.end)
            return shared.attend(layer, grouped, keys, values, mask, scale).flatten(1, 2)
        mask = self._mask(scores)
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)

    def _mask(self, scores: Scores, start: int = 0) -> torch.Tensor | None:
        """[n, 1, 1, K - start] of the keys from `start` on, or None where every row sees all keys."""
        if scores.reach not in self._masks:
            plain = self._equal and scores.see_all(self._visible)
            self._masks[scores.reach] = (
                None
                if plain
                else visible_keys(self._positions[:, None], self._visible, scores, self.shape.dtype)
            )
        mask = self._masks[scores.reach]
        return None if mask is None else mask[..., start:]

    def _share(self, queries_per_key: int) -> SharedKeys:
        """What rows have in common; it stays the same until one enters or leaves."""
        if self._shared is None:
            shape = self.shape
            key_bytes = shape.heads * (shape.key_dim + shape.value_dim) * shape.dtype.itemsize
            cuts = cuts_of(self._prefixes, key_bytes=key_bytes, queries_per_key=queries_per_key)
            self._shared = SharedKeys(cuts, self.keys[:, : self._active], self.values[:, : self._active])
        return self._shared

    def _index(self) -> None:
        self._layers = list(zip(self.keys, self.values, strict=True))
        lines = torch.arange(self.rows * self.shape.heads, device=self.shape.device)
        self._lines = lines.view(self.rows, self.shape.heads) * self.capacity
