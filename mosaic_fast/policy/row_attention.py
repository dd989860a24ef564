"""Attention of the last layer on the rows that predict something; keys and values are of all positions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedConfig

from mosaic_fast.policy.attention import TreeForward, forest_attention

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def attention_on_rows(
    attention: nn.Module,  # for which `has_known_attention`
    hidden: Tensor,  # [1, U, D] normed
    tree: TreeForward,
    position_embeddings: object,  # cos, sin: [1, U, rotary D]
) -> Tensor:  # [1, N, D]
    """What the module's own forward gives on the rows. Its projections and norms are called as modules."""
    rows = tree.forest.rows
    cos, sin = cast(tuple[Tensor, Tensor], position_embeddings)
    query, key, value = _projections(attention, hidden, rows)
    # The family's own rotary embedding, whose results of no heads are dropped.
    rotate: Rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
    query, _ = rotate(query, query[:, :0], cos.index_select(1, rows), sin.index_select(1, rows))
    _, key = rotate(key[:, :0], key, cos, sin)
    config = cast(PreTrainedConfig, attention.config)
    window = getattr(attention, "sliding_window", None)
    if config.model_type == "phi3":  # keeps it in its configuration, for all layers
        window = getattr(config, "sliding_window", None)
    attended, _ = forest_attention(
        attention,
        query,
        key,
        value,
        None,
        tree=tree,
        on_rows=True,
        scaling=cast(float, attention.scaling),
        sliding_window=window,
    )
    output = cast(nn.Module, attention.o_proj)
    return output(attended.flatten(2))


def _projections(
    attention: nn.Module, hidden: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # [1, Hq, N, D], [1, Hkv, U, D] twice, not yet rotated
    head_dim = cast(int, attention.head_dim)
    parts = dict(attention.named_children())
    if "qkv_proj" in parts:
        config = cast(PreTrainedConfig, attention.config)
        heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        split = parts["qkv_proj"](hidden).split([count * head_dim for count in heads], dim=-1)
        query, key, value = split[0].index_select(1, rows), split[1], split[2]
    else:
        query = parts["q_proj"](hidden.index_select(1, rows))
        key, value = parts["k_proj"](hidden), parts["v_proj"](hidden)
    query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in (query, key, value))
    if "q_norm" in parts:
        query, key = parts["q_norm"](query), parts["k_norm"](key)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
