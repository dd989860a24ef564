"""Supervised learning on a forest has the loss and the gradient of transformers' own forward with labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from mosaic_fast.config import Config
from mosaic_fast.learner.execution import Execution
from mosaic_fast.learner.learner import Learner
from mosaic_fast.learner.step_batch import StepBatch, step_batch
from mosaic_fast.policy import Policy
from tests.learner.flat_oracle import VOCAB
from tests.learner.rollouts_for_tests import make_rollout
from tests.learner.test_learner_exactness import PLANS
from tests.policy.policy_helpers import assert_gradients_close, tiny_model


def conversations() -> list[tuple[np.ndarray, np.ndarray]]:
    """Seven that share a system prompt of six tokens, one of them twice; in each, two runs are trained."""
    random = np.random.default_rng(1)
    system = random.integers(0, VOCAB, 6)
    found = []
    for length in (3, 9, 5, 10, 7, 4):
        ids = np.concatenate([system, random.integers(0, VOCAB, length)])
        trained = np.arange(len(ids)) >= 7
        trained[10:12] = False  # an observation
        found.append((ids, trained))
    return [*found, found[2]]


def with_labels(model: PreTrainedModel, normalisation: str) -> torch.Tensor:
    """The loss of a padded batch with labels; `sequence`: each row's mean, averaged.

    transformers rounds logits to fp32 in its own loss, which is therefore held to that.
    """
    rows = conversations()
    ids = torch.zeros(len(rows), max(len(tokens) for tokens, _ in rows), dtype=torch.int64)
    seen, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, trained) in enumerate(rows):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        seen[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.from_numpy(np.where(trained, tokens, -100))
    found = model(input_ids=ids, attention_mask=seen, labels=labels)
    logits, targets = found.logits[:, :-1], labels[:, 1:]
    whole = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(float(found.loss.detach() - whole.detach())) < 1e-6
    if normalisation == "token":
        return whole
    rows_alone = [F.cross_entropy(row, wanted) for row, wanted in zip(logits, targets, strict=True)]
    return torch.stack(rows_alone).mean()


def batch() -> StepBatch:
    rollouts = [
        make_rollout(rollout_id=i, token_ids=tokens, trained=trained)
        for i, (tokens, trained) in enumerate(conversations())
    ]
    ones = [np.ones(1)] * len(rollouts)
    return step_batch([[rollout] for rollout in rollouts], [np.full((1, 1), 0.5)] * len(rollouts), ones, ones)


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
@pytest.mark.parametrize("plan", PLANS)
def test_loss_and_gradient_are_those_of_a_forward_with_labels(plan: str, normalisation: str):
    config = Config.model_validate(
        {
            "rollout": {"max_rollout_tokens": 24, "max_step_tokens": 8},
            "forest": {"tokens_per_microbatch": 24},
            "loss": {"normalisation": normalisation},
            "optim": {"grad_clip": 1e9},
            "sft": {"demonstrations": 1},
        }
    )
    assert config.loss.name == "sft"
    assert config.optim.epochs == 1
    model = tiny_model("qwen3")
    expected = with_labels(model, normalisation)
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    learner = Learner(Policy(model), None, config)
    learner._execution = Execution(PLANS[plan], 1.0, model.config, plan="auto" if plan == "tree" else plan)
    seen: dict[str, torch.Tensor] = {}

    def record(*_: object) -> None:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    learner.optimizer.adamw.register_step_pre_hook(record)
    figures = learner.update(batch(), 0)
    assert_gradients_close(seen, wanted, 1e-10)
    assert abs(figures["policy/loss"] - float(expected.detach())) < 1e-10
    if normalisation == "token":
        assert abs(figures["policy/nll"] - float(expected.detach())) < 1e-10
    assert figures["tree/sharing"] > 1.2
