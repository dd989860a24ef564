"""A forward over a forest that ends in the rows that predict a trained token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.policy.attention import TreeForward
from mosaic_fast.policy.head import head_logprobs
from mosaic_fast.policy.layer import Arguments, run_layer, run_norm
from mosaic_fast.policy.layout import decoder_of, has_known_layer
from mosaic_fast.policy.support import depends_on_length, rope_type

LayerCall: TypeAlias = Callable[[Tensor, TreeForward, Arguments], Tensor]
"""A layer as `final_hidden` calls it: hidden states [1, U, D] -> [1, U, D], of the last one [1, N, D]."""

ForwardInParts: TypeAlias = Callable[[TreeForward, int, float, bool], tuple[Tensor, Tensor | None]]
"""(tree, longest_alone, temperature, return_entropy) -> log-probs of the edges [E], entropies of rows [N]."""


def layer_calls(model: PreTrainedModel) -> list[LayerCall]:
    """The layers of a model of known layout, in order."""
    layers = decoder_of(model).layers[: model.config.num_hidden_layers]
    return [partial(_call, model, layer) for layer in layers[:-1]] + [partial(_call_last, model, layers[-1])]


def run_in_parts(
    model: PreTrainedModel,
    layers: Sequence[LayerCall],
    tree: TreeForward,
    longest_alone: int,
    temperature: float,
    return_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The forward of a model of known layout; with its first two arguments given, a `ForwardInParts`."""
    hidden = final_hidden(model, tree, longest_alone, layers)
    if not len(tree.forest.rows):
        return hidden.new_zeros(0), None
    return head_logprobs(
        model.lm_head,
        hidden,
        tree.forest,
        vocab_size=model.config.vocab_size,
        temperature=temperature,
        return_entropy=return_entropy,
    )


def final_hidden(
    model: PreTrainedModel, tree: TreeForward, longest_alone: int, layers: Sequence[LayerCall]
) -> Tensor:  # [N, D] normed, what the LM head reads
    """Call a model of known layout part by part; the last layer and the final norm see the N rows only.

    longest_alone: length of the longest rollout, which may exceed the pack's in a part of a cut forest.
    """
    forest, decoder = tree.forest, decoder_of(model)
    hidden = decoder.embed_tokens(forest.tokens)
    arguments: Arguments = {
        "attention_mask": None,
        "position_ids": forest.positions,
        "past_key_values": None,
        "use_cache": False,
        "position_embeddings": _rotary(decoder.rotary_emb, hidden, forest.positions, longest_alone),
        "tree": tree,
    }
    for layer in layers:
        hidden = layer(hidden, tree, arguments)
    return run_norm(model, decoder.norm, hidden, hidden.device.type == "cpu")[0]


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


def _call(
    model: PreTrainedModel, layer: nn.Module, hidden: Tensor, tree: TreeForward, arguments: Arguments
) -> Tensor:
    fewer = hidden.device.type == "cpu"
    if fewer and has_known_layer(model, layer) and not _is_checkpointed(layer):
        return run_layer(model, layer, hidden, tree, arguments, None, fewer=fewer)
    return layer(hidden, **arguments)


def _call_last(
    model: PreTrainedModel, layer: nn.Module, hidden: Tensor, tree: TreeForward, arguments: Arguments
) -> Tensor:
    rows = tree.forest.rows
    if has_known_layer(model, layer):
        return run_layer(model, layer, hidden, tree, arguments, rows, fewer=hidden.device.type == "cpu")
    return layer(hidden, **arguments).index_select(1, rows)


def _is_checkpointed(layer: nn.Module) -> bool:
    """True if the layer's own call keeps its input only, and runs again in the backward pass."""
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))
