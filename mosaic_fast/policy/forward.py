"""A forward over a forest, in one of several ways, down to the log-probs of the trained edges.

Where the model's parts may be called one by one, the last layer, the norm and the head run on the rows that
predict a trained token. An edge that several rollouts share is computed once. Which way is right for a model
is shown by `admission.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.policy.attention import TreeForward
from mosaic_fast.policy.forest_tensors import ForestTensors
from mosaic_fast.policy.layer import Arguments, run_layer, run_norm
from mosaic_fast.policy.layout import (
    decoder_of,
    has_known_layer,
    has_known_layout,
    has_stock_forward,
    is_plain_linear,
)
from mosaic_fast.policy.support import depends_on_length, rope_type
from mosaic_kernels import linear_logprob

LayerCall: TypeAlias = Callable[[Tensor, TreeForward, Arguments], Tensor]
"""A layer as `final_hidden` calls it: hidden states [1, U, D] -> [1, U, D], of the last one [1, N, D]."""

ForwardInParts: TypeAlias = Callable[[TreeForward, int, float, bool], tuple[Tensor, Tensor | None]]
"""(tree, longest_alone, temperature, return_entropy) -> log-probs of the edges [E], entropies of rows [N]."""


Way = Literal["parts", "layers", "decoder", "model"]
"""How much of a model is called as a whole.

parts: projections, norms and MLP of each layer, on a CPU in fewer operations; layers: each layer; decoder:
all but the LM head; model: its own forward, which makes all logits of the rows at once.
"""
WAYS: tuple[Way, ...] = ("parts", "layers", "decoder", "model")


def way_of(model: PreTrainedModel, shown: Way) -> Way:
    """The way in which the model is run now, where `shown` was shown to be right for its classes.

    A model or a decoder that somebody has put a hook or another forward on is called as a whole.
    """
    if shown in ("parts", "layers") and not has_known_layout(model):
        return "model"
    return "model" if shown == "decoder" and not has_stock_forward(model) else shown


def run_model(
    model: PreTrainedModel,
    way: Way,
    tree: TreeForward,
    longest_alone: int,
    temperature: float,
    return_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The forward of a model; with its first two arguments given, a `ForwardInParts`."""
    if way in ("parts", "layers"):
        calls = layer_calls(model, way)
        return run_in_parts(model, calls, tree, longest_alone, temperature, return_entropy)
    forest = tree.forest
    if longest_alone != forest.longest and depends_on_length(model):
        raise UserError(
            f"RoPE type {rope_type(model)!r} of a hooked or replaced model cannot be shown the length of a "
            "rollout that was cut: raise the token budget, or remove the hooks of the model and its decoder"
        )
    if way == "decoder":
        output = cast(nn.Module, decoder_of(model))(
            input_ids=forest.tokens, position_ids=forest.positions, use_cache=False, tree=tree
        )
        hidden = output.last_hidden_state[0].index_select(0, forest.rows)
        return _edges(model, hidden, tree, temperature, return_entropy)
    output = model(
        input_ids=forest.tokens,
        position_ids=forest.positions,
        use_cache=False,
        logits_to_keep=forest.rows,
        tree=tree,
    )
    return logprobs_from_logits(output.logits[0], forest.targets, forest.edge_rows, temperature)


def layer_calls(model: PreTrainedModel, way: Way) -> list[LayerCall]:
    """The layers of a model of known layout, in order."""
    layers = decoder_of(model).layers[: model.config.num_hidden_layers]
    apart = way == "parts"
    calls: list[LayerCall] = [partial(_call, model, layer, apart) for layer in layers[:-1]]
    return [*calls, partial(_call_last, model, layers[-1], apart)]


def run_in_parts(
    model: PreTrainedModel,
    layers: Sequence[LayerCall],
    tree: TreeForward,
    longest_alone: int,
    temperature: float,
    return_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The forward of a model of known layout."""
    hidden = final_hidden(model, tree, longest_alone, layers)
    return _edges(model, hidden, tree, temperature, return_entropy)


def _edges(
    model: PreTrainedModel,
    hidden: Tensor,  # [N, D] normed
    tree: TreeForward,
    temperature: float,
    return_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    if not len(tree.forest.rows):
        return hidden.new_zeros(0), None
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return head_logprobs(
        cast(nn.Module, model.get_output_embeddings()),
        hidden,
        tree.forest,
        vocab_size=config.vocab_size,
        temperature=temperature,
        scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
        return_entropy=return_entropy,
        backend=tree.lm_head,
    )


def final_hidden(
    model: PreTrainedModel, tree: TreeForward, longest_alone: int, layers: Sequence[LayerCall]
) -> Tensor:  # [N, D] normed, what the LM head reads
    """Call a model of known layout part by part; the last layer and the final norm see the N rows only.

    longest_alone: length of the longest rollout, which may exceed the pack's in a part of a cut forest.
    """
    forest, decoder = tree.forest, decoder_of(model)
    hidden = decoder.embed_tokens(forest.tokens)
    multiplier = getattr(model.config, "embedding_multiplier", None)
    if multiplier is not None:
        hidden = hidden * multiplier
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
    return run_norm(model, decoder.norm, hidden, _in_fewer_operations(hidden))[0]


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
    model: PreTrainedModel,
    layer: nn.Module,
    apart: bool,
    hidden: Tensor,
    tree: TreeForward,
    arguments: Arguments,
) -> Tensor:
    fewer = apart and _in_fewer_operations(hidden)
    if fewer and has_known_layer(model, layer) and not _is_checkpointed(layer):
        return run_layer(model, layer, hidden, tree, arguments, None, fewer=fewer)
    return layer(hidden, **arguments)


def _call_last(
    model: PreTrainedModel,
    layer: nn.Module,
    apart: bool,
    hidden: Tensor,
    tree: TreeForward,
    arguments: Arguments,
) -> Tensor:
    rows = tree.forest.rows
    if apart and has_known_layer(model, layer):
        return run_layer(model, layer, hidden, tree, arguments, rows, fewer=_in_fewer_operations(hidden))
    return layer(hidden, **arguments).index_select(1, rows)


def _in_fewer_operations(hidden: Tensor) -> bool:
    """True if a layer's parts may be run as one operation each: on a CPU, in the precision of the weights."""
    return hidden.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _is_checkpointed(layer: nn.Module) -> bool:
    """True if the layer is checkpointed: it keeps its input only, and runs again in the backward pass."""
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


MAX_LOGITS = 2**25
"""Logits in memory at once where the LM head has to be called as a module (fp32: 128 MiB)."""


def head_logprobs(
    head: nn.Module,
    hidden: Tensor,  # [N, D]
    forest: ForestTensors,
    *,
    vocab_size: int,
    temperature: float,
    scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # [E], [N]
    """From the LM head's matrix where that is all it is; else through the module, a chunk of rows at a time.

    A chunk's logits are computed again in the backward pass, so hooks on the head run twice in training.
    backend: of `linear_logprob`, which a head that has to be called does without.

    scale, softcap: of the logits, before the temperature divides them, as of `linear_logprob`.
    """
    if is_plain_linear(head):
        one = partial(
            linear_logprob, hidden, head.weight, forest.targets, rows=forest.edge_rows, bias=head.bias,
            temperature=temperature, scale=scale, softcap=softcap, backend=backend,
        )  # fmt: skip
        return one(return_entropy=True) if return_entropy else (one(return_entropy=False), None)

    def run(rows: Tensor, targets: Tensor, edge_rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(rows[None])[0] * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logprobs_from_logits(logits, targets, edge_rows, temperature)

    chunk = max(1, MAX_LOGITS // vocab_size)
    if len(hidden) <= chunk:
        return run(hidden, forest.targets, forest.edge_rows)
    starts = torch.arange(0, len(hidden) + chunk, chunk, device=hidden.device)
    edges = torch.searchsorted(forest.edge_rows, starts).tolist()  # edges are ordered by row
    results = []
    for start, first, last in zip(starts.tolist()[:-1], edges[:-1], edges[1:], strict=True):
        arguments = (
            hidden[start : start + chunk],
            forest.targets[first:last],
            forest.edge_rows[first:last] - start,
        )
        results.append(checkpoint(run, *arguments, use_reentrant=False))
    logprobs, entropy = zip(*results, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def logprobs_from_logits(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [E] int64
    edge_rows: Tensor,  # [E] int64 in [0, N)
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [E], [N] fp32, or fp64 for fp64 logits
    """Log-probs of the targets and the entropy of every row, at the temperature."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)
    # A token of log-prob -inf has probability 0 and adds 0 to the entropy, not NaN.
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(dtype).min)).sum(-1)
    return logprobs[edge_rows, targets], entropy
