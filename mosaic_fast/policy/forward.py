"""A forward over a forest that ends in the rows that predict a trained token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.policy.attention import TreeForward
from mosaic_fast.policy.layout import DecoderLayer, decoder_of, has_known_attention, has_known_layer
from mosaic_fast.policy.row_attention import attention_on_rows
from mosaic_fast.policy.support import depends_on_length, rope_type


def final_hidden(
    model: PreTrainedModel, tree: TreeForward, longest_alone: int
) -> Tensor:  # [N, D] normed, what the LM head reads
    """Call a model of known layout part by part; the last layer and the final norm see the N rows only.

    longest_alone: length of the longest rollout, which may exceed the pack's in a part of a cut forest.
    """
    forest, decoder = tree.forest, decoder_of(model)
    hidden = decoder.embed_tokens(forest.tokens)
    arguments: dict[str, object] = {
        "attention_mask": None,
        "position_ids": forest.positions,
        "past_key_values": None,
        "use_cache": False,
        "position_embeddings": _rotary(decoder.rotary_emb, hidden, forest.positions, longest_alone),
        "tree": tree,
    }
    layers = decoder.layers[: model.config.num_hidden_layers]
    for layer in layers[:-1]:
        hidden = layer(hidden, **arguments)
    if has_known_layer(model, layers[-1]):
        hidden = _layer_on_rows(model, cast(DecoderLayer, layers[-1]), hidden, tree, arguments)
    else:
        hidden = layers[-1](hidden, **arguments).index_select(1, forest.rows)
    return decoder.norm(hidden)[0]


def final_logits(model: PreTrainedModel, tree: TreeForward, longest_alone: int) -> Tensor:  # [N, V]
    """Call a model of any layout as a whole: its own forward keeps the logits of the N rows."""
    forest = tree.forest
    if longest_alone != forest.longest and depends_on_length(model):
        raise UserError(
            f"RoPE type {rope_type(model)!r} of a hooked or replaced model cannot be shown the length of a "
            "rollout that was cut: raise the token budget, or remove the hooks of the model and its decoder"
        )
    output = model(
        input_ids=forest.tokens,
        position_ids=forest.positions,
        use_cache=False,
        logits_to_keep=forest.rows,
        tree=tree,
    )
    return output.logits[0]


def _rotary(
    rotary_emb: nn.Module, hidden: Tensor, positions: Tensor, longest_alone: int
) -> tuple[Tensor, Tensor]:  # cos, sin [1, U, rotary D]
    """Cosines and sines as each rollout alone would see them.

    Frequencies that depend on the longest position are shown it: a last position, dropped afterwards.
    """
    last = positions.new_full((1, 1), max(longest_alone - 1, 0))
    cos, sin = rotary_emb(hidden, position_ids=torch.cat([positions, last], dim=1))
    return cos[:, :-1], sin[:, :-1]


def _layer_on_rows(
    model: PreTrainedModel,
    layer: DecoderLayer,
    hidden: Tensor,  # [1, U, D]
    tree: TreeForward,
    arguments: dict[str, object],
) -> Tensor:  # [1, N, D]
    """The last layer: keys and values of all positions, everything else of the N rows."""
    rows, normed = tree.forest.rows, layer.input_layernorm(hidden)
    if has_known_attention(model, layer.self_attn):
        attended = attention_on_rows(layer.self_attn, normed, tree, arguments["position_embeddings"])
    else:
        attended = layer.self_attn(hidden_states=normed, **arguments)[0].index_select(1, rows)
    hidden = hidden.index_select(1, rows) + attended
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
