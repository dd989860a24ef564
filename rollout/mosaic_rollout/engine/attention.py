"""Attention over cached keys and values, inside an unmodified transformers model.

A forward runs on a packed row of T tokens, of any sequences and positions. What each of them attends to is
known to the `Attend` that travels with the forward: it keeps the new keys and values, too.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "mosaic_engine_attention"
_FOREIGN = ("softcap", "s_aux", "position_bias")


class Attend(Protocol):
    """Keys, values and visibility of one forward's T tokens."""

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the new keys [T, Hkv, Dk] and values [T, Hkv, Dv] of a layer."""
        ...

    def attend(self, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
        """[T, Hq, Dk] -> [T, Hq, Dv], over what has been stored."""
        ...


def served_attention(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, Dk]
    key: Tensor,  # [1, Hkv, T, Dk]
    value: Tensor,  # [1, Hkv, T, Dv]
    attention_mask: Tensor | None,  # never read
    *,
    served: Attend | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused: object,
) -> tuple[Tensor, None]:  # [1, T, Hq, Dv]
    """transformers' attention signature in front of an `Attend`."""
    if served is None:
        raise ValueError(f"{type(module).__name__} does not hand keywords on to its attention")
    for name in _FOREIGN:
        if unused.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {name}, which LocalEngine does not serve")
    layer = module.layer_idx
    assert isinstance(layer, int)
    served.store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return served.attend(layer, query[0].transpose(0, 1), scale, sliding_window)[None], None


def register() -> None:
    """Make `served_attention` selectable by name in a model's configuration."""
    AttentionInterface.register(ATTENTION_NAME, served_attention)


def visible_keys(
    positions: Tensor,  # [R, t] int64 of the queries
    keys: int,  # key j of a row is its sequence's token j
    window: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Additive mask [R, 1, t, keys]: 0 where the query's position sees the key, -inf elsewhere.

    Of the model's dtype, because SDPA would convert a boolean mask once a layer.
    """
    at = torch.arange(keys, device=positions.device)
    hidden = at > positions[:, :, None]
    if window is not None:
        hidden |= positions[:, :, None] - at >= window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, -torch.inf)[:, None]


def grouped_attention(
    query: Tensor,  # [R, Hq, t, Dk]
    keys: Tensor,  # [R, Hkv, k, Dk]
    values: Tensor,  # [R, Hkv, k, Dv]
    mask: Tensor | None,  # [1 or R, 1, t, k]; None: causal, t = k
    scale: float,
) -> Tensor:  # [R, Hq, t, Dv]
    """SDPA whose query heads share key heads."""
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
