"""What the engine's attention computes, and what some layers do to theirs without handing it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

_SCORES = 2**24  # in memory at a time where SDPA cannot compute them: 64 MiB


@dataclass(frozen=True, eq=False)
class Scores:
    """How a layer makes softmax weights of its queries and keys."""

    scale: float
    window: int | None = None
    chunk: int | None = None  # positions; attention stays within a chunk
    softcap: float | None = None  # bends scores to c tanh(score / c)
    sinks: Tensor | None = None  # [Hq] one more logit a head, whose value is 0

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """What masks depend on."""
        return self.window, self.chunk

    def see_all(self, keys: int) -> bool:
        """Whether neither window nor chunk hides one of the first `keys` keys."""
        size = self.window if self.chunk is None else self.chunk
        return size is None or keys <= size


def visible_keys(
    positions: Tensor,  # [R, t] int64 of the queries
    keys: int,  # key j of a row is its sequence's token j
    scores: Scores,
    dtype: torch.dtype,
) -> Tensor:
    """Additive mask [R, 1, t, keys]: 0 where the query's position sees the key, -inf elsewhere.

    Of the model's dtype, because SDPA would convert a boolean mask once a layer.
    """
    at = torch.arange(keys, device=positions.device)
    hidden = at > positions[:, :, None]
    if scores.window is not None:
        hidden |= positions[:, :, None] - at >= scores.window
    if scores.chunk is not None:
        hidden |= positions[:, :, None] // scores.chunk != at // scores.chunk
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, -torch.inf)[:, None]


def grouped_attention(
    query: Tensor,  # [R, Hq, t, Dk]
    keys: Tensor,  # [R, Hkv, k, Dk]
    values: Tensor,  # [R, Hkv, k, Dv]
    mask: Tensor | None,  # [1 or R, 1, t, k]; None: causal where t = k, else everything is seen
    scores: Scores,
) -> Tensor:  # [R, Hq, t, Dv]
    """Attention whose query heads share key heads: SDPA, where it can."""
    length = query.shape[2]
    if scores.softcap is None and scores.sinks is None:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None and length == keys.shape[2],
            scale=scores.scale, enable_gqa=True,
        )  # fmt: skip
    if mask is None and length == keys.shape[2] > 1:
        at = torch.arange(length, device=query.device)
        mask = visible_keys(at[None], length, Scores(scores.scale), query.dtype)
    rows = max(1, _SCORES // (query.shape[0] * query.shape[1] * keys.shape[2]))
    return torch.cat(
        [
            _bent_attention(
                query[:, :, start : start + rows],
                keys,
                values,
                None if mask is None else mask[:, :, start : start + rows],
                scores,
            )
            for start in range(0, length, rows)
        ],
        dim=2,
    )


def _bent_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scores: Scores
) -> Tensor:
    """The same with a softcap or sinks, in fp32 or wider."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).unflatten(1, (keys.shape[1], -1)) * scores.scale  # [R, Hkv, G, t, D]
    logits = grouped @ keys.to(dtype)[:, :, None].mT
    if scores.softcap is not None:
        logits = (logits / scores.softcap).tanh() * scores.softcap
    if mask is not None:
        logits = logits + mask[:, :, None]
    if scores.sinks is not None:
        sinks = scores.sinks.to(dtype).view(1, keys.shape[1], -1, 1, 1)
        logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], -1)
    weights = logits.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values.to(dtype)[:, :, None]).flatten(1, 2).to(query.dtype)


def chunk_of(module: nn.Module) -> int | None:
    """Positions a chunk of a layer's attention, which transformers says in the mask alone (Llama 4)."""
    config = cast(PreTrainedConfig, module.config)
    types, layer = getattr(config, "layer_types", None), cast(int, module.layer_idx)
    return config.attention_chunk_size if types and types[layer] == "chunked_attention" else None


def tempered(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    positions: Tensor,  # [T]
) -> Tensor:  # [1, H, T, D]
    """Queries scaled by position, where the layer has scaled them by their place in the row (Llama 4)."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def scales(at: Tensor) -> Tensor:
        steps = torch.floor((at.float() + 1.0) / cast(float, module.floor_scale))
        return torch.log1p(steps) * cast(float, module.attn_scale) + 1.0

    wanted, applied = scales(positions), scales(torch.arange(query.shape[2], device=query.device))
    ratio = (wanted.double() / applied).to(torch.promote_types(query.dtype, torch.float32))
    return (query * ratio[:, None]).to(query.dtype)
