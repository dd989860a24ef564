"""Which models run without their modules, and that what they compute is the model's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from mosaic_fast.policy import StockDecoder
from mosaic_rollout.engine.adapter import CausalModel
from tests.rollout.engine.helpers import (
    generate,
    local_engine,
    random_tokens,
    request,
    stock_logprobs,
    tiny_model,
)

STOCK = ("llama", "qwen2", "qwen2_window", "qwen3")


@pytest.mark.parametrize("family", STOCK)
def test_stock_models_of_fp32_call_no_module(family: str) -> None:
    model = tiny_model(family, torch.float32)
    engine = local_engine(model)
    called: list[str] = []
    forward = nn.Linear.forward

    def watched(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        called.append("linear")
        return forward(module, x)

    watched.__module__ = forward.__module__  # else the class would not be taken for torch's own

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", watched)
        [completion] = generate(engine, [request(random_tokens(9, 1), 6)])
        assert not called
        stock = stock_logprobs(model, request(random_tokens(9, 1), 6), completion)
        assert called
    np.testing.assert_allclose(completion.logprobs, stock, rtol=0, atol=1e-5)


def _hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 0.5 * output)


def _replaced_forward(model: PreTrainedModel) -> None:
    linear = model.model.layers[2].self_attn.o_proj
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight)


class _Adapted(nn.Linear):
    """An adapter, as peft puts in: a module in a linear's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.base = base

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.base(input) + super().forward(input)


def _adapter(model: PreTrainedModel) -> None:
    torch.manual_seed(1)
    attention = model.model.layers[0].self_attn
    attention.v_proj = _Adapted(attention.v_proj)


def _activation(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def _bias(model: PreTrainedModel) -> None:
    torch.manual_seed(1)
    model.lm_head = nn.Linear(32, model.config.vocab_size)


@pytest.mark.parametrize("change", [_hook, _replaced_forward, _adapter, _activation])
def test_a_changed_model_is_served_as_it_is(change: Callable[[PreTrainedModel], None]) -> None:
    # put in after the engine was made, as an adapter may be
    model = tiny_model("qwen3", torch.float32)
    engine = local_engine(model)
    assert StockDecoder.of(model) is not None
    change(model)
    assert StockDecoder.of(model) is None
    asked = request(random_tokens(9, 1), 6)
    [completion] = generate(engine, [asked])
    np.testing.assert_allclose(completion.logprobs, stock_logprobs(model, asked, completion), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_replaced_parameters_and_biases_are_served(family: str) -> None:
    model = tiny_model(family, torch.float32)
    engine = local_engine(model)
    generate(engine, [request(random_tokens(9, 1), 2)])
    _bias(model)
    gate = model.model.layers[0].mlp.gate_proj
    gate.weight = nn.Parameter(gate.weight.detach().flip(0).clone())
    asked = request(random_tokens(9, 2), 6)
    [completion] = generate(engine, [asked])
    np.testing.assert_allclose(completion.logprobs, stock_logprobs(model, asked, completion), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_go_through_their_modules(dtype: torch.dtype) -> None:
    assert StockDecoder.of(tiny_model("qwen3", dtype)) is None
    assert StockDecoder.of(tiny_model("phi3", torch.float32)) is None


def test_attention_that_hides_its_window_is_refused() -> None:
    model = tiny_model("qwen2_window")
    model.model.layers[2].self_attn.sliding_window = None
    with pytest.raises(ValueError, match=r"windows \[None, 7, None\]"):
        CausalModel(model)
