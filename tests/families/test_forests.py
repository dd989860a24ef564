"""On a forest, however it is cut, log-probs and gradients are those of each rollout alone: fp64, 1e-10."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mosaic_fast.config import ModelConfig
from mosaic_fast.learner.execution import Execution, MicroBatch
from mosaic_fast.learner.lora import Lora
from mosaic_fast.policy import Policy
from mosaic_fast.policy.layout import checkpoint_activations
from mosaic_fast.policy.shape import Shape
from tests.families.families import PROVED, config_of, model_of, shown, wholly_fp64
from tests.policy.policy_helpers import (
    Rollouts,
    assert_gradients_close,
    example_rollouts,
    gradients,
    loss_weights,
    stock_logprobs,
)

PLANS = {"tree": 4096, "cut": 14, "kept": 14, "flat": 14}


def rollouts() -> Rollouts:
    """Forks, a fork of a fork, a duplicate, a prefix, a second tree; longer than four windows."""
    return example_rollouts(seed=3, length=14)


def of_forest(model: PreTrainedModel, data: Rollouts, plan: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [T] and gradients of a sum of log-probs and entropies, run by a plan of the learner."""
    policy, forest = Policy(model), data.pack()
    execution = Execution(PLANS[plan], 0.7, Shape.of(model.config), plan=plan)
    schedule = execution.schedule(forest)
    assert plan in ("tree", "flat") or len(schedule.parts) > 2
    a, b = loss_weights(forest.num_tokens)
    measured = torch.zeros(forest.num_tokens, dtype=torch.float64)
    model.zero_grad()

    def loss_of(part: MicroBatch) -> Tensor:
        measured[part.source] = part.logprobs.detach()
        return (a[part.source] * part.logprobs + b[part.source] * part.entropy).sum()

    execution.backward(policy, schedule, loss_of)
    grads = {name: p.grad for name, p in model.named_parameters()}
    return measured, {n: torch.zeros(()) if g is None else g.clone() for n, g in grads.items()}


def compare(model: PreTrainedModel, plans: list[str]) -> None:
    Policy(model)  # it proves itself in fp32
    with wholly_fp64():
        _compare(model, rollouts(), plans)


def _compare(model: PreTrainedModel, data: Rollouts, plans: list[str]) -> None:
    logprobs, entropy = stock_logprobs(model, data, 0.7)
    a, b = loss_weights(len(logprobs))
    expected = gradients(model, (a * logprobs + b * entropy).sum())
    assert float(np.mean([float(g.norm()) for g in expected.values()])) > 1e-3
    for plan in plans:
        got, found = of_forest(model, data, plan)
        torch.testing.assert_close(got, logprobs.detach(), rtol=1e-10, atol=1e-11)
        assert_gradients_close(found, expected, 1e-10)


@pytest.mark.parametrize("family", shown(PROVED))
def test_every_way_to_cut(family: str) -> None:
    compare(model_of(config_of(family)), list(PLANS))


@pytest.mark.parametrize("family", shown(PROVED, ["gemma4_text"]))
def test_activation_checkpointing(family: str) -> None:
    model = model_of(config_of(family))
    checkpoint_activations(model)
    compare(model, ["tree", "kept"])


@pytest.mark.parametrize("family", shown(PROVED, ["mixtral"]))
def test_adapters(family: str) -> None:
    """On every linear module; experts, which are no modules, stay as they are."""
    model = model_of(config_of(family))
    Lora(model, ModelConfig(lora_rank=2), seed=0)
    module: torch.nn.Module = model
    module.double()
    with torch.no_grad():
        for number, weight in enumerate(p for p in model.parameters() if p.requires_grad):
            weight.copy_(torch.sin(torch.arange(weight.numel()) + number).view_as(weight) / 5)
    compare(model, ["tree", "cut"])
