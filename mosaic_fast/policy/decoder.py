"""A stock decoder such as Llama's computed from its weights without calling its modules, for sampling.

For a small model a module costs more than its arithmetic. Same operations in the same order; fused where
PyTorch has a fused one. The weights are the model's own tensors, nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm, silu
from transformers import PreTrainedModel

from mosaic_fast.policy.layout import (
    decoder_of,
    has_hooks,
    has_known_attention,
    has_known_layer,
    has_known_layout,
    has_stock_forward,
    has_stock_norm,
    is_plain_linear,
    mlp_weights,
    window_of,
)
from mosaic_rollout.engine.adapter import Attend
from mosaic_rollout.engine.attention import Scores


@dataclass(frozen=True)
class _Linear:
    """x [T, in] -> x w + bias, [T, out]."""

    weight: Tensor  # [in, out], a view
    bias: Tensor | None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight, out=out)
        return torch.addmm(self.bias, x, self.weight, out=out)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        residual.addmm_(x, self.weight)
        if self.bias is not None:
            residual.add_(self.bias)


@dataclass(frozen=True)
class _Layer:
    norm: Tensor
    query: _Linear
    key: _Linear
    value: _Linear
    head_norms: tuple[Tensor, Tensor] | None  # of queries and keys, [D] each
    output: _Linear
    mlp_norm: Tensor
    gate: _Linear
    up: _Linear
    down: _Linear
    scores: Scores


class StockDecoder:
    """The forward of a model of known layout. Make it anew when modules may have changed (`of` is cheap)."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.get_decoder()
        layers = cast(nn.ModuleList, decoder.layers)
        self._embedding = _weight(decoder, "embed_tokens")
        self._layers = [_layer_of(layer) for layer in layers]
        self._norm = _weight(decoder, "norm")
        self._head = _linear(model, "lm_head")
        self._eps: float = model.config.rms_norm_eps
        self._head_dim = cast(int, _part(layers[0], "self_attn").head_dim)
        self._rotary = _part(decoder, "rotary_emb")
        self._cos = self._sin = self._embedding.new_empty(0, 1, self._head_dim)

    @classmethod
    def of(cls, model: PreTrainedModel) -> StockDecoder | None:
        """None for a model that is not exactly transformers' own: other classes, hooks, adapters, dtypes.

        fp32 only: in half precision the order of roundings would differ from the modules' by more than it
        is worth, and the modules compute norms of fp64 models in fp32.
        """
        return cls(model) if is_stock(model) else None

    def forward(self, tokens: Tensor, positions: Tensor, served: Attend, *, logits: bool) -> Tensor:
        """As `CausalModel.forward`: logits [T, V], or [0, V] where nobody wants them."""
        hidden = embedding(tokens, self._embedding)
        cos, sin = self._angles(positions)
        width, last = (hidden.shape[1],), len(self._layers) - 1
        for number, layer in enumerate(self._layers):
            normed = rms_norm(hidden, width, layer.norm, self._eps)
            if number == last and not logits:
                _, key = self._rotated(layer, normed, cos, sin, queries=False)
                served.store(number, key, layer.value(normed).unflatten(1, (-1, self._head_dim)))
                return hidden[:0] @ self._head.weight
            query, key = self._rotated(layer, normed, cos, sin)
            served.store(number, key, layer.value(normed).unflatten(1, (-1, self._head_dim)))
            attended = served.attend(number, query, layer.scores)
            layer.output.add_to(hidden, attended.flatten(1))
            normed = rms_norm(hidden, width, layer.mlp_norm, self._eps)
            gated = silu(layer.gate(normed), inplace=True).mul_(layer.up(normed))
            layer.down.add_to(hidden, gated)
        return self._head(rms_norm(hidden, width, self._norm, self._eps))

    def _rotated(
        self, layer: _Layer, normed: Tensor, cos: Tensor, sin: Tensor, *, queries: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Queries [T, Hq, D] (none without `queries`) and keys [T, Hkv, D], normed where the model does."""
        dim, split = self._head_dim, layer.query.weight.shape[1] if queries else 0
        both = normed.new_empty(len(normed), split + layer.key.weight.shape[1])
        if queries:
            layer.query(normed, out=both[:, :split])
        layer.key(normed, out=both[:, split:])
        heads = both.unflatten(1, (-1, dim))
        split //= dim
        if layer.head_norms is not None:
            heads = rms_norm(heads, (dim,), eps=self._eps)
            heads[:, :split] *= layer.head_norms[0]
            heads[:, split:] *= layer.head_norms[1]
        heads = torch.addcmul(heads * cos, heads.roll(dim // 2, -1), sin)
        return heads[:, :split], heads[:, split:]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, D], the sine's first half negative: x cos + roll(x) sin rotates x."""
        needed = int(positions.max()) + 1
        if needed > len(self._cos):
            count = max(needed, 2 * len(self._cos), 256)
            at = torch.arange(count, device=self._embedding.device)[None]
            cos, sin = self._rotary(self._embedding, at)
            half = self._head_dim // 2
            self._cos, self._sin = (
                cos[0, :, None],
                torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)[:, None],
            )
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def is_stock(model: PreTrainedModel) -> bool:
    """Whether the model is, module for module, what `StockDecoder` computes."""
    if not has_known_layout(model):
        return False
    decoder = decoder_of(model)
    if any(has_hooks(module) for module in (model, *model.modules())) or not all(
        _is_stock_layer(model, layer) for layer in decoder.layers
    ):
        return False
    head_dim = cast(int, _part(decoder.layers[0], "self_attn").head_dim)
    return (
        type(decoder.embed_tokens) is nn.Embedding
        and has_stock_forward(decoder.embed_tokens)
        and has_stock_forward(decoder.rotary_emb)
        and has_stock_norm(model, decoder.norm)
        and is_plain_linear(_part(model, "lm_head"))
        and len(decoder.layers) == model.config.num_hidden_layers
        and 2 * _tensor(decoder.rotary_emb, "inv_freq").numel() == head_dim  # whole heads are rotated
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    )


def _is_stock_layer(model: PreTrainedModel, layer: nn.Module) -> bool:
    if not has_known_layer(model, layer) or not has_known_attention(model, _part(layer, "self_attn")):
        return False
    attention = _part(layer, "self_attn")
    norms = [_part(layer, "input_layernorm"), _part(layer, "post_attention_layernorm")]
    norms += [part for name, part in attention.named_children() if name.endswith("_norm")]
    linears = [part for name, part in attention.named_children() if name.endswith("_proj")]
    return (
        hasattr(attention, "q_proj")  # each projection a module of its own
        and all(has_stock_norm(model, norm) for norm in norms)
        and all(is_plain_linear(linear) for linear in linears)
        and mlp_weights(model, _part(layer, "mlp")) is not None
    )


def _layer_of(layer: nn.Module) -> _Layer:
    attention, mlp = _part(layer, "self_attn"), _part(layer, "mlp")
    norms = (
        (_weight(attention, "q_norm"), _weight(attention, "k_norm")) if hasattr(attention, "q_norm") else None
    )
    return _Layer(
        norm=_weight(layer, "input_layernorm"),
        query=_linear(attention, "q_proj"),
        key=_linear(attention, "k_proj"),
        value=_linear(attention, "v_proj"),
        head_norms=norms,
        output=_linear(attention, "o_proj"),
        mlp_norm=_weight(layer, "post_attention_layernorm"),
        gate=_linear(mlp, "gate_proj"),
        up=_linear(mlp, "up_proj"),
        down=_linear(mlp, "down_proj"),
        scores=Scores(cast(float, attention.scaling), window_of(attention)),
    )


def _part(module: nn.Module, name: str) -> nn.Module:
    return cast(nn.Module, getattr(module, name))


def _tensor(module: object, name: str) -> Tensor:
    return cast(Tensor, getattr(module, name)).detach()


def _weight(module: nn.Module, name: str) -> Tensor:
    return _tensor(_part(module, name), "weight")


def _linear(module: nn.Module, name: str) -> _Linear:
    linear = cast(nn.Linear, _part(module, name))
    return _Linear(linear.weight.detach().t(), None if linear.bias is None else linear.bias.detach())
