"""A model in small: the same classes, every kind of layer, few and narrow layers, random weights.

What proves or refuses a model is its code and its configuration, not its weights. In small both are tried in
a fraction of a second, in fp32, where a mistake is far above the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoModelForCausalLM, PreTrainedModel

from mosaic_fast.errors import UserError

VOCAB = 96
WINDOW = 5
"""Tokens that a window or a chunk of the copy holds: fewer than a rollout of the proof has."""
_MOST_LAYERS = 24
_NUMBERS: dict[str, int] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "linear_num_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_n_groups": 2,
    "n_groups": 2,
    "mamba_chunk_size": WINDOW,
    "chunk_size": WINDOW,
    "num_global_key_value_heads": 2,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
}
"""The most that the copy has of what a configuration names so. Heads of attention keep their sizes."""
_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size")
_MOST_WIDE = 64


def small_copy(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The copy, in fp32 on the model's device and in training mode; its weights are drawn from `seed` alone.

    UserError where transformers cannot make one. Python's, NumPy's and PyTorch's generators are left alone.
    """
    layers = enough_layers(model)
    tried: list[str] = []
    for widths in (True, False):
        changes = _changes(model.config.to_dict(), model.config.num_hidden_layers, layers, widths=widths)
        try:
            config = type(model.config).from_dict(model.config.to_dict() | changes)
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                copy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as error:  # noqa: BLE001  a size that does not go with another breaks any line
            tried.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        _draw(copy, seed)
        module: nn.Module = copy
        module.to(model.device if model.device.type != "meta" else "cpu")
        return copy.train()
    raise UserError(f"transformers cannot make {type(model).__name__} in small to try it: {tried[0]:.200}")


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers in order, whatever they are called; none where they are not found."""
    count = model.config.num_hidden_layers
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return list(next(lists, ()))


def enough_layers(model: PreTrainedModel) -> int:
    """How many of the first layers hold every kind of layer that the model has, at least two."""
    last = max(kinds_of_layers(model), default=0)
    return min(max(2, last + 1), _MOST_LAYERS, model.config.num_hidden_layers)


def kinds_of_layers(model: PreTrainedModel) -> list[int]:
    """For each layer the number of the first one of its kind."""
    kinds = [_kind(layer) for layer in layers_of(model)]
    return [kinds.index(kind) for kind in kinds]


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """What tells two layers apart: classes of their parts, switches, and which numbers are there at all."""
    return tuple(
        (name, type(part).__name__, attribute, value if isinstance(value, bool | str) else value is None)
        for name, part in layer.named_modules()
        for attribute, value in sorted(vars(part).items())
        if (value is None or isinstance(value, bool | str | int | float))
        and attribute not in ("training", "gradient_checkpointing")
        and not attribute.endswith(("idx", "index"))
    )


def _changes(config: dict[str, object], whole: int, layers: int, *, widths: bool) -> dict[str, object]:
    """The keys of a configuration of `whole` layers that the copy of the first `layers` has otherwise.

    widths: False leaves every width as it is, where a configuration does not take smaller ones.
    """
    changes: dict[str, object] = {"num_hidden_layers": layers}
    changes |= {key: None for key in ("pad_token_id", "bos_token_id", "eos_token_id") if key in config}
    shared = config.get("num_kv_shared_layers")
    if isinstance(shared, int) and shared:  # the last ones read keys of earlier ones
        changes["num_kv_shared_layers"] = max(0, layers - (whole - shared))
    for key, value in config.items():
        by_layer = isinstance(value, list | tuple) or (isinstance(value, str) and "pattern" in key)
        if by_layer and len(value) == whole and whole > 2:
            changes[key] = value[:layers]
        elif key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            changes[key] = 0.0  # refused where it is switched on, at every forward
        elif isinstance(value, int) and not isinstance(value, bool):
            if key == "max_position_embeddings":
                changes[key] = max(value, 8 * WINDOW)
            elif key in _NUMBERS:
                changes[key] = min(value, _NUMBERS[key])
            elif key.endswith(_WIDTHS):
                changes[key] = min(value, _MOST_WIDE)
    _keep_ratios(config, changes)
    return changes if widths else {key: changes[key] for key in changes if not _is_width(key)}


def _is_width(key: str) -> bool:
    heads = ("num_attention_heads", "num_key_value_heads", "mamba_n_heads")
    return key.endswith(_WIDTHS) or key == "hidden_size" or key in heads


def _keep_ratios(config: dict[str, object], changes: dict[str, object]) -> None:
    """Heads that share keys still do, heads keep their size, and groups of experts have two each."""
    heads, of_keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(of_keys, int) and of_keys:
        keys = min(of_keys, 2)
        changes["num_key_value_heads"] = keys
        changes["num_attention_heads"] = keys * min(2, max(1, heads // of_keys))
    hidden = config.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and config.get("head_dim") is None:
        changes["hidden_size"] = cast(int, changes["num_attention_heads"]) * (hidden // heads)
    expand, of_head = config.get("mamba_expand"), config.get("mamba_d_head")
    if isinstance(expand, int) and isinstance(of_head, int):
        changes["mamba_n_heads"] = expand * cast(int, changes.get("hidden_size", hidden)) // of_head
    groups = config.get("n_group")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(groups, int) and groups > 1 and isinstance(config.get(key), int):
            changes[key] = min(cast(int, config[key]), 2 * groups)


def _draw(model: PreTrainedModel, seed: int) -> None:
    """Matrices that keep the size of what they are given, vectors around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *_saved_buffers(model)):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise * tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 1.0 + 0.2 * noise)
    for part in model.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0


def _saved_buffers(model: nn.Module) -> Iterator[Tensor]:
    for part in model.modules():
        for name, buffer in part._buffers.items():
            kept = name not in part._non_persistent_buffers_set
            if kept and buffer is not None and buffer.is_floating_point():
                yield buffer
