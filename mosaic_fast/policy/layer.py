"""A layer of known layout, part by part: in fewer operations on a CPU, the last one on the needed rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mosaic_fast.policy.attention import TreeForward, forest_attention
from mosaic_fast.policy.elementwise import rms_norm, rotate
from mosaic_fast.policy.layout import (
    DecoderLayer,
    has_known_attention,
    has_stock_norm,
    mlp_weights,
    window_of,
)
from mosaic_fast.policy.projections import can_be_joined, gated_mlp, joined, rows_a_block

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Attend = Callable[..., tuple[Tensor, None]]
"""transformers' attention signature, as that of `forest_attention`."""
Arguments = dict[str, object]


def run_layer(
    model: PreTrainedModel,
    layer: nn.Module,  # for which `has_known_layer`
    hidden: Tensor,  # [1, U, D]
    tree: TreeForward | None,  # what `attend` reads
    arguments: Arguments,  # of a layer's own call
    rows: Tensor | None,  # [N]: those whose results are wanted; None: all
    *,
    fewer: bool,
    attend: Attend = forest_attention,
) -> Tensor:  # [1, N or U, D]
    """What the layer's own forward gives on the rows; keys and values are of all positions.

    fewer: norms and rotary embedding as one operation each, which is measured on CPUs alone.
    """
    parts = cast(DecoderLayer, layer)
    normed = run_norm(model, parts.input_layernorm, hidden, fewer)
    if has_known_attention(model, parts.self_attn):
        embeddings = arguments["position_embeddings"]
        attended = _attention(model, parts.self_attn, normed, tree, embeddings, rows, fewer, attend)
    else:
        attended = _picked(parts.self_attn(hidden_states=normed, **arguments)[0], rows)
    hidden = _picked(hidden, rows) + attended
    normed = run_norm(model, parts.post_attention_layernorm, hidden, fewer)
    return hidden + _run_mlp(model, parts.mlp, normed, fewer)


def run_norm(model: PreTrainedModel, norm: nn.Module, x: Tensor, fewer: bool) -> Tensor:  # both [..., D]
    """Call a norm; as one operation where it is the family's, in fp32, in which transformers computes it."""
    weight = norm.weight
    if (
        fewer
        and has_stock_norm(model, norm)
        and isinstance(weight, Tensor)
        and x.dtype == weight.dtype == torch.float32
    ):
        return rms_norm(x, weight, cast(float, norm.variance_epsilon))
    return norm(x)


def _run_mlp(model: PreTrainedModel, mlp: nn.Module, x: Tensor, fewer: bool) -> Tensor:  # both [1, N, D]
    """Call an MLP; in blocks where it is the family's, in fp32 or fp64, and there is more than one block."""
    weights = mlp_weights(model, mlp) if fewer else None
    if weights is None or x.dtype.itemsize < 4 or any(w.dtype != x.dtype for w in weights):
        return mlp(x)
    return mlp(x) if rows_a_block(x.shape[1], len(weights[0])) == x.shape[1] else gated_mlp(x, *weights)


def _attention(
    model: PreTrainedModel,
    attention: nn.Module,
    hidden: Tensor,  # [1, U, D] normed
    tree: TreeForward | None,  # what `attend` reads
    position_embeddings: object,  # cos, sin: [1, U, rotary D]
    rows: Tensor | None,
    fewer: bool,
    attend: Attend,
) -> Tensor:  # [1, N or U, D]
    """The attention of a known layer, whose projections and norms are called as modules."""
    cos, sin = cast(tuple[Tensor, Tensor], position_embeddings)
    query, key, value = _projections(model, attention, hidden, rows, fewer)
    query, key = _rotated(attention, query, key, (_picked(cos, rows), _picked(sin, rows)), (cos, sin), fewer)
    attended, _ = attend(
        attention,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        tree=tree,
        on_rows=rows is not None,
        scaling=cast(float, attention.scaling),
        sliding_window=window_of(attention),
    )
    output = cast(nn.Module, attention.o_proj)
    return output(attended.flatten(2))


def _projections(
    model: PreTrainedModel, attention: nn.Module, hidden: Tensor, rows: Tensor | None, fewer: bool
) -> tuple[Tensor, Tensor, Tensor]:  # [1, N or U, Hq, D], [1, U, Hkv, D] twice, not yet rotated
    head_dim = cast(int, attention.head_dim)
    parts = dict(attention.named_children())
    if "qkv_proj" in parts:
        config = cast(PreTrainedConfig, attention.config)
        heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        split = parts["qkv_proj"](hidden).split([count * head_dim for count in heads], dim=-1)
        query, key, value = _picked(split[0], rows), split[1], split[2]
    else:
        modules = [parts[name] for name in ("q_proj", "k_proj", "v_proj")]
        if rows is None and fewer and can_be_joined(hidden, modules):
            query, key, value = joined(hidden, cast(list[nn.Linear], modules))
            if "q_norm" not in parts:
                value = value.clone()  # as a view it would keep queries and keys, which nothing else does
        else:
            query = modules[0](_picked(hidden, rows))
            key, value = modules[1](hidden), modules[2](hidden)
    query, key, value = (x.unflatten(-1, (-1, head_dim)) for x in (query, key, value))
    if "q_norm" in parts:
        query, key = (
            run_norm(model, parts[name], x, fewer) for name, x in (("q_norm", query), ("k_norm", key))
        )
    return query, key, value


def _rotated(
    attention: nn.Module,
    query: Tensor,  # [1, N, Hq, D]
    key: Tensor,  # [1, U, Hkv, D]
    of_query: tuple[Tensor, Tensor],  # cos, sin: [1, N, rotary D]
    of_key: tuple[Tensor, Tensor],  # [1, U, rotary D]
    fewer: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys: in one operation each in fp32 and fp64, else by the family's own function.

    The family's function rotates both together, so each call is given no heads of the other.
    """
    if fewer and query.dtype == of_key[0].dtype and query.dtype.itemsize >= 4:
        return rotate(query, *of_query), rotate(key, *of_key)
    family: Rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    query, _ = family(query, query[:, :0], *of_query)
    _, key = family(key[:, :0], key, *of_key)
    return query.transpose(1, 2), key.transpose(1, 2)


def _picked(x: Tensor, rows: Tensor | None) -> Tensor:
    """[1, U, ...] -> [1, N, ...]."""
    return x if rows is None else x.index_select(1, rows)
