"""The model is used as it is: hooks, LoRA layers and replaced forwards count, and nothing stays changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

import mosaic_fast.policy.forward as head_module
from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy
from mosaic_fast.policy.attention import ATTENTION_NAME
from mosaic_fast.policy.layout import has_known_attention, has_known_layer, has_known_layout
from tests.policy.alterations import ALTERATIONS
from tests.policy.policy_helpers import (
    assert_gradients_close,
    decoder,
    example_rollouts,
    gradients,
    loss_weights,
    stock_logprobs,
    tiny_model,
)


@pytest.mark.parametrize("alter", ALTERATIONS, ids=lambda alter: alter.__name__)
@pytest.mark.parametrize("max_logits", [head_module.MAX_LOGITS, 50], ids=["whole", "chunks"])
def test_alterations_are_honoured(
    alter: Callable[[PreTrainedModel], None], max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the equally altered stock model, and different from the unaltered one."""
    monkeypatch.setattr(head_module, "MAX_LOGITS", max_logits)
    data = example_rollouts()
    a, b = loss_weights(sum(map(len, data.sequences)))
    unaltered = stock_logprobs(tiny_model("qwen3-window"), data)[0]
    model = tiny_model("qwen3-window")
    alter(model)
    logprobs, entropy = stock_logprobs(model, data)
    expected_gradients = gradients(model, (a * logprobs + b * entropy).sum())
    got, got_entropy = Policy(model).logprobs(data.pack(), return_entropy=True)
    torch.testing.assert_close(got, logprobs, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(got_entropy, entropy, rtol=1e-10, atol=1e-11)
    assert_gradients_close(gradients(model, (a * got + b * got_entropy).sum()), expected_gradients, 1e-10)
    assert float((unaltered - logprobs).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "phi3", "llama"])
def test_stock_models_take_the_fast_path(case: str) -> None:
    """The parts are called one by one; the last layer's keys alone see more than the needed rows."""
    model, data = tiny_model(case), example_rollouts()
    assert has_known_layout(model)
    assert has_known_layer(model, decoder(model).layers[-1])
    attention = decoder(model).layers[-1].self_attn
    assert has_known_attention(model, attention)
    rows: list[int] = []
    queries = [attention.q_proj] if hasattr(attention, "q_proj") else []
    for module in [*queries, attention.o_proj, decoder(model).norm]:
        forward = module.forward
        module.forward = lambda x, forward=forward: (rows.append(x.shape[1]), forward(x))[1]
    forest = data.pack()
    Policy(model).logprobs(forest)
    needed = len(set(forest.parent[forest.node_index[forest.trained]].tolist()))
    assert rows == [needed] * (len(queries) + 2)
    assert needed < forest.num_nodes


def test_every_layer_is_called_as_a_module() -> None:
    model, data = tiny_model("llama"), example_rollouts()
    called: list[str] = []
    for name, module in model.named_modules():
        if name and name not in ("model", "model.layers"):
            module.register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
    Policy(model).logprobs(data.pack())
    expected = {name for name, _ in model.named_modules()} - {"", "model", "model.layers"}
    assert set(called) == expected


def test_attention_setting_comes_back() -> None:
    """After a forward, and after an error in the middle of one."""
    model, data = tiny_model("phi3"), example_rollouts()
    model.config._attn_implementation = "eager"
    seen: list[str | None] = []
    hook = (
        decoder(model)
        .layers[0]
        .register_forward_hook(lambda *_: seen.append(model.config._attn_implementation))
    )
    Policy(model).logprobs(data.pack())
    assert seen == [ATTENTION_NAME]
    assert model.config._attn_implementation == "eager"
    hook.remove()

    def fail(*_: object) -> None:
        raise RuntimeError("from a hook")

    decoder(model).layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="from a hook"):
        Policy(model).logprobs(data.pack())
    assert model.config._attn_implementation == "eager"


def test_model_without_the_attention_interface_is_noticed() -> None:
    model, data = tiny_model("qwen2"), example_rollouts()
    for layer in decoder(model).layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UserError, match="layer 0 mixes positions outside attention"):
        Policy(model).logprobs(data.pack())
