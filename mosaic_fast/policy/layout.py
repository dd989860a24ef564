"""What a model is made of: whether its parts look as if they could be called one by one.

That they may be called so is shown by `admission.py`.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import SiLUActivation

_DECODER_PARTS = {"embed_tokens", "rotary_emb", "layers", "norm"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = [
    {"q_proj", "k_proj", "v_proj", "o_proj"},
    {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    {"qkv_proj", "o_proj"},
]


class Decoder(Protocol):
    """The parts of a decoder of known layout, in the order in which they are called."""

    embed_tokens: nn.Module
    rotary_emb: nn.Module
    layers: nn.ModuleList
    norm: nn.Module


class DecoderLayer(Protocol):
    """The parts of a layer of known layout."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The model inside the causal LM; its parts are those named where it `has_known_layout`."""
    found = model.get_decoder()
    return cast(Decoder, getattr(model, "model", found) if found is model else found)


def has_stock_forward(module: nn.Module) -> bool:
    """True if calling the module runs its class's own forward and nothing else: no hook, no replacement."""
    return (
        "forward" not in vars(module)
        and not has_hooks(module)
        and getattr(type(module).forward, "__module__", None) == type(module).__module__
    )


def has_known_layout(model: PreTrainedModel) -> bool:
    """True if embed_tokens, layers, norm and lm_head are all of the model's parts, and nobody changed it.

    So it looks for classes of transformers itself without a hook or another forward on these two. That
    calling the parts in order is the whole model is for `admission.py` to show.
    """
    return has_known_decoder(model) and has_stock_forward(model)


def has_known_decoder(model: PreTrainedModel) -> bool:
    """`has_known_layout`, whatever became of the model's forward."""
    decoder = model.get_decoder()
    return (
        _is_class(model, model, "ForCausalLM")
        and type(decoder).__module__ == type(model).__module__
        and {name for name, _ in decoder.named_children()} == _DECODER_PARTS
        and {name for name, _ in model.named_children()} == {"model", "lm_head"}
        and has_stock_forward(decoder)
    )


def has_known_layer(model: PreTrainedModel, layer: nn.Module) -> bool:
    """True if the layer is attention and MLP, each behind a norm, and unhooked.

    A hook anywhere inside expects to see all positions. Phi-3's dropouts do nothing where Policy runs at all.
    """
    parts = {name for name, part in layer.named_children() if not isinstance(part, nn.Dropout)}
    return (
        _is_class(model, layer, "DecoderLayer")
        and parts == _LAYER_PARTS
        and has_stock_forward(layer)
        and not any(has_hooks(module) for module in layer.modules())
    )


def has_known_attention(model: PreTrainedModel, attention: nn.Module) -> bool:
    """True if the attention of a known layer is projections, rotary embedding and the attention function."""
    return (
        _is_class(model, attention, "Attention")
        and {name for name, _ in attention.named_children()} in _ATTENTION_PARTS
        and has_stock_forward(attention)
    )


def has_stock_norm(model: PreTrainedModel, norm: nn.Module) -> bool:
    """True if the norm is the family's RMSNorm and calling it runs that and nothing else."""
    return _is_class(model, norm, "RMSNorm") and has_stock_forward(norm) and hasattr(norm, "variance_epsilon")


def window_of(attention: nn.Module) -> int | None:
    """Tokens that the attention of a known layer sees, itself included; None: all before it.

    Some families keep it in their configuration, for all layers.
    """
    config = cast(PreTrainedConfig, attention.config)
    return cast("int | None", getattr(attention, "sliding_window", getattr(config, "sliding_window", None)))


def mlp_weights(model: PreTrainedModel, mlp: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gate [I, D], up [I, D] and down [D, I] of the family's MLP with SiLU, None if it is anything else.

    Those of gate and up are views where one module holds both (Phi-3), gate first.
    """
    parts = dict(mlp.named_children())
    activation = parts.pop("act_fn", None) or parts.pop("activation_fn", None)
    if (
        not _is_class(model, mlp, "MLP")
        or not has_stock_forward(mlp)
        or not isinstance(activation, nn.SiLU | SiLUActivation)
        or not has_stock_forward(activation)
        or not all(is_plain_linear(part) and part.bias is None for part in parts.values())
    ):
        return None
    weights = {name: cast(nn.Linear, part).weight for name, part in parts.items()}
    match weights:
        case {"gate_proj": gate, "up_proj": up, "down_proj": down, **others} if not others:
            return gate, up, down
        case {"gate_up_proj": both, "down_proj": down, **others} if not others:
            gate, up = both.chunk(2)
            return gate, up, down
        case _:
            return None


def checkpoint_activations(model: PreTrainedModel, *, reentrant: bool = False) -> None:
    """Have transformers run each layer again in the backward pass; the method has two names."""
    name = "activation_checkpointing_enable"  # transformers 5.17 has the other one only
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": reentrant})


def checkpoints_activations(model: PreTrainedModel) -> bool:
    """True if layers run a second time in the backward pass."""
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def checkpoints_reentrantly(model: PreTrainedModel) -> bool:
    """True if layers are checkpointed without a graph of their first run: nothing in them can be held."""
    functions = [
        vars(m)["_gradient_checkpointing_func"]
        for m in model.modules()
        if getattr(m, "gradient_checkpointing", False)
    ]
    # Without the keyword torch's checkpoint is reentrant.
    return any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True if the module is nothing but a matrix and a bias."""
    return type(module) is nn.Linear and has_stock_forward(module)


def has_hooks(module: nn.Module) -> bool:
    """True if something of a user's runs before, after or in the backward pass of the module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_class(model: PreTrainedModel, module: nn.Module, kind: str) -> bool:
    """Whether a module is of transformers' class of that kind in the model's own family."""
    family, where = type(model).__qualname__.removesuffix("ForCausalLM"), type(model).__module__
    return (
        where.startswith("transformers.models.")
        and type(module).__module__ == where
        and type(module).__qualname__ == family + kind
    )
