"""On a forest, log-probs, entropies and all gradients equal each rollout alone through the stock model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mosaic_fast.policy import Policy
from mosaic_fast.policy.layout import checkpoint_activations
from mosaic_kernels import split_forest
from tests.policy.policy_helpers import (
    FAMILIES,
    Rollouts,
    assert_gradients_close,
    decoder,
    example_rollouts,
    fp64_model,
    gradients,
    loss_weights,
    rollouts,
    stock_logprobs,
    tiny_model,
)


def weighted(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """A loss that gives every token's log-prob and entropy a coefficient of its own."""
    a, b = loss_weights(len(logprobs))
    return (a * logprobs).sum() + (b * entropy).sum()


@pytest.mark.parametrize("case", FAMILIES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=rollouts(), temperature=st.sampled_from([1.0, 0.7]))
def test_forest_equals_rollouts_alone(case: str, data: Rollouts, temperature: float) -> None:
    model = fp64_model(case)
    expected = stock_logprobs(model, data, temperature)
    expected_gradients = gradients(model, weighted(*expected))
    got = Policy(model).logprobs(data.pack(), temperature=temperature, return_entropy=True)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    assert_gradients_close(gradients(model, weighted(*got)), expected_gradients, 1e-10)


@pytest.mark.parametrize("length", range(2, 8))
@pytest.mark.parametrize("case", ["qwen2-window", "phi3-window"])
def test_window_around_the_length(case: str, length: int) -> None:
    """A window starts to matter at two more tokens than it holds: the last token predicts nothing."""
    data = Rollouts([np.arange(length)], [np.arange(length) > 0])
    model = fp64_model(case)
    expected = stock_logprobs(model, data)[0]
    torch.testing.assert_close(Policy(model).logprobs(data.pack()), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", ["qwen3-window", "phi3"])
@settings(max_examples=15, deadline=None)
@given(data=rollouts(), slack=st.integers(0, 8))
def test_parts_of_a_cut_forest_add_up(case: str, data: Rollouts, slack: int) -> None:
    model, forest = fp64_model(case), data.pack()
    policy = Policy(model)
    whole = policy.logprobs(forest, return_entropy=True)
    whole_gradients = gradients(model, weighted(*whole))
    a, b = loss_weights(forest.num_tokens)
    longest = max((len(s) for s in data.sequences), default=0)
    joined, loss = torch.zeros_like(whole[0]), torch.zeros(())
    for part in split_forest(forest, longest + slack or 1):
        logprobs, entropy = policy.logprobs(part, return_entropy=True)
        assert part.source is not None
        source = torch.from_numpy(part.source)
        joined = joined.index_add(0, source, logprobs.detach())
        loss = loss + (a[source] * logprobs).sum() + (b[source] * entropy).sum()
    torch.testing.assert_close(joined, whole[0].detach(), rtol=1e-10, atol=1e-11)
    assert_gradients_close(gradients(model, loss), whole_gradients, 1e-10)


@pytest.mark.parametrize("case", FAMILIES)
def test_fp32_stock_model(case: str) -> None:
    """Nothing replaced at all: fp32 norms, fp32 softmax."""
    model, data = tiny_model(case, torch.float32), example_rollouts()
    got = Policy(model).logprobs(data.pack(), return_entropy=True)
    expected = stock_logprobs(model, data)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
    a, b = (w.float() for w in loss_weights(len(got[0])))
    got_gradients = gradients(model, (a * got[0]).sum() + (b * got[1]).sum())
    expected_gradients = gradients(model, (a * expected[0]).sum() + (b * expected[1]).sum())
    assert_gradients_close(got_gradients, expected_gradients, 3e-5)


def test_bf16_is_close_to_fp32() -> None:
    """Log-probs come back in fp32; the distance is that of bf16 activations."""
    data = example_rollouts()
    model = tiny_model("qwen3", torch.float32)
    expected = Policy(model).logprobs(data.pack())
    got = Policy(model.bfloat16()).logprobs(data.pack())
    got.sum().backward()
    assert got.dtype == torch.float32
    assert float((got - expected).detach().abs().mean()) < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["qwen3-window", "phi3-window"])
def test_gradient_checkpointing(case: str, reentrant: bool) -> None:
    """Layers run again in the backward pass, after logprobs has restored the model's own attention."""
    model, data = tiny_model(case), example_rollouts()
    expected = gradients(model, weighted(*stock_logprobs(model, data)))
    runs: list[int] = []
    decoder(model).layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    checkpoint_activations(model, reentrant=reentrant)
    before = decoder(model).layers[0]._gradient_checkpointing_func
    got = Policy(model).logprobs(data.pack(), return_entropy=True)
    assert decoder(model).layers[0]._gradient_checkpointing_func is before
    assert_gradients_close(gradients(model, weighted(*got)), expected, 1e-10)
    assert len(runs) == 2  # it did run again


def test_frozen_and_partly_frozen_models() -> None:
    """Gradients reach what is trainable, and nothing is required of a model that is frozen."""
    model, data = tiny_model("llama"), example_rollouts()
    expected = gradients(model, stock_logprobs(model, data)[0].sum())
    model.requires_grad_(False)
    assert not Policy(model).logprobs(data.pack()).requires_grad
    decoder(model).layers[1].mlp.requires_grad_(True)
    got = gradients(model, Policy(model).logprobs(data.pack()).sum())
    for name, gradient in got.items():
        if "layers.1.mlp" in name:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-11)


def test_same_bits_every_time() -> None:
    """Forests are prepared once; the second pass reuses that and changes nothing."""
    model, forest = tiny_model("qwen3", torch.float32), example_rollouts().pack()
    policy = Policy(model)
    first, second = policy.logprobs(forest), policy.logprobs(forest)
    assert torch.equal(first, second)
    one, two = gradients(model, first.sum()), gradients(model, second.sum())
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_inference_mode_then_training() -> None:
    """What the first pass prepares must serve a later pass with gradient."""
    model, data = tiny_model("phi3-window"), example_rollouts()
    policy, forest = Policy(model), data.pack()
    with torch.inference_mode():
        first = policy.logprobs(forest).clone()
    second = policy.logprobs(forest)
    second.sum().backward()
    torch.testing.assert_close(torch.zeros_like(second) + first, second.detach(), rtol=0, atol=0)


def test_nothing_to_train() -> None:
    """Zeros that a loss can be backpropagated through, for any forest without trained tokens."""
    policy = Policy(tiny_model("qwen2"))
    for sequences in ([], [[]], [[1]], [[1, 2], [1, 3]]):
        data = Rollouts(
            [torch.tensor(s, dtype=torch.int64).numpy() for s in sequences],
            [torch.zeros(len(s), dtype=torch.bool).numpy() for s in sequences],
        )
        logprobs, entropy = policy.logprobs(data.pack(), return_entropy=True)
        assert logprobs.shape == entropy.shape == (sum(map(len, sequences)),)
        assert not logprobs.any()
        assert not entropy.any()
        (logprobs.sum() + entropy.sum()).backward()
