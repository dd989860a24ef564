"""What people do to a model that must count: hooks, LoRA layers and replaced forwards."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.policy.policy_helpers import decoder


class LoRA(nn.Module):
    """A low-rank update beside a frozen matrix, as PEFT's layers wrap it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear)
        generator = torch.Generator().manual_seed(1)
        self.base = base
        self.down = nn.Parameter(torch.randn(base.in_features, 2, generator=generator, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(2, base.out_features, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


def lora_everywhere(model: PreTrainedModel) -> None:
    for layer in decoder(model).layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
        layer.mlp.down_proj = LoRA(layer.mlp.down_proj)
    model.lm_head = LoRA(model.lm_head)


def hooked_head(model: PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 0.5 * logits)


def hooked_last_mlp(model: PreTrainedModel) -> None:
    decoder(model).layers[-1].mlp.register_forward_hook(lambda module, inputs, out: 2.0 * out)


def hooked_last_layer(model: PreTrainedModel) -> None:
    decoder(model).layers[-1].register_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0], *inputs[1:]))


def replaced_attention(model: PreTrainedModel) -> None:
    attention = decoder(model).layers[-1].self_attn
    attention.forward = types.MethodType(
        lambda self, hidden_states, **kwargs: type(self).forward(self, 0.6 * hidden_states, **kwargs),
        attention,
    )


def replaced_mlp(model: PreTrainedModel) -> None:
    mlp = decoder(model).layers[-1].mlp
    mlp.forward = types.MethodType(lambda self, x: self.down_proj(self.up_proj(x).tanh()), mlp)


def replaced_layer(model: PreTrainedModel) -> None:
    layer = decoder(model).layers[-1]
    layer.forward = types.MethodType(
        lambda self, x, **kwargs: type(self).forward(self, 0.7 * x, **kwargs), layer
    )


def hooked_decoder(model: PreTrainedModel) -> None:
    def scale(module: nn.Module, inputs: object, output: dict[str, Tensor]) -> dict[str, Tensor]:
        output["last_hidden_state"] = 3.0 * output["last_hidden_state"]
        return output

    decoder(model).register_forward_hook(scale)


def hooked_model(model: PreTrainedModel) -> None:
    def scale(module: nn.Module, inputs: object, output: dict[str, Tensor]) -> dict[str, Tensor]:
        output["logits"] = 0.25 * output["logits"]
        return output

    model.register_forward_hook(scale)


ALTERATIONS = [
    lora_everywhere,
    hooked_head,
    hooked_last_mlp,
    hooked_last_layer,
    replaced_attention,
    replaced_mlp,
    replaced_layer,
    hooked_decoder,
    hooked_model,
]
