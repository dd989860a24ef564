"""Shared = flat: the learner's gradient on a forest is the flat batch's through the stock model, in fp64."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from mosaic_fast.config import Config, ForestConfig, LossConfig, ModelConfig, OptimConfig, RolloutConfig
from mosaic_fast.errors import TrainingError
from mosaic_fast.learner import Learner
from mosaic_fast.policy import Policy
from mosaic_kernels import pack_forest
from tests.policy.policy_helpers import VOCAB, tiny_model


def policy_and_reference() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two small fp64 models that differ, the second one frozen by how it is used."""
    model, reference = tiny_model("qwen2"), tiny_model("qwen2")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.1)
    return model, reference


def settings_of(
    tokens_per_microbatch: int, *, kl_weight: float = 0.1, epochs: int = 1, lr: float = 1e-3
) -> Config:
    return Config(
        model=ModelConfig(path="unused"),
        rollout=RolloutConfig(max_rollout_tokens=24, max_step_tokens=8, temperature=0.7),
        forest=ForestConfig(tokens_per_microbatch=tokens_per_microbatch),
        loss=LossConfig(kl_weight=kl_weight),
        optim=OptimConfig(epochs=epochs, grad_clip=1e9, lr=lr),
    )


def flat_loss(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    sequences: list[np.ndarray],
    trained: list[np.ndarray],
    advantages: np.ndarray,
) -> torch.Tensor:
    """GRPO of each rollout alone through the stock model: ratio 1, so the surrogate is -A r, and k3."""
    total, count = torch.zeros((), dtype=torch.float64), sum(int(t.sum()) for t in trained)
    for ids, mask, advantage in zip(sequences, trained, advantages, strict=True):
        if len(ids) < 2:
            continue
        tokens = torch.from_numpy(ids)[None]
        logprobs, frozen = (
            torch.log_softmax(m(tokens).logits[0, :-1] / 0.7, -1).gather(1, tokens[0, 1:, None])[:, 0]
            for m in (model, reference)
        )
        keep = torch.from_numpy(mask[1:])
        ratio = (logprobs - logprobs.detach()).exp()
        difference = frozen.detach() - logprobs
        terms = -ratio * float(advantage) + 0.1 * (difference.exp() - difference - 1)
        total = total + terms[keep].sum()
    return total / count


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """2 to 6 rollouts that share prefixes, with masks of their own."""
    trunk = draw(st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=10))
    sequences, trained = [], []
    for _ in range(draw(st.integers(2, 6))):
        kept = draw(st.integers(1, len(trunk)))
        tail = draw(st.lists(st.integers(0, VOCAB - 1), min_size=0, max_size=10))
        sequences.append(np.array(trunk[:kept] + tail, dtype=np.int64))
        length = kept + len(tail) - 1
        trained.append(np.array([False, *draw(st.lists(st.booleans(), min_size=length, max_size=length))]))
    if not any(mask.any() for mask in trained):
        sequences[0], trained[0] = np.array([1, 2]), np.array([False, True])
    advantages = draw(st.lists(st.floats(-2, 2, width=32), min_size=len(sequences), max_size=len(sequences)))
    return sequences, trained, np.array(advantages)


def gradients_of(
    case: tuple[list[np.ndarray], list[np.ndarray], np.ndarray], tokens_per_microbatch: int
) -> dict[str, torch.Tensor]:
    """The gradient an update leaves just before its optimiser step."""
    sequences, trained, advantages = case
    seen: dict[str, torch.Tensor] = {}
    model, reference = policy_and_reference()
    learner = Learner(Policy(model), Policy(reference), settings_of(tokens_per_microbatch))
    learner.optimizer.register_step_pre_hook(_recorder(model, seen))
    forest = pack_forest(sequences, trained)
    learner.update(forest, np.zeros(forest.num_tokens, np.float32), advantages, 0)
    return seen


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """1e-10 relative to each parameter's own gradient, or to the largest where its own is all but zero."""
    floor = 1e-4 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        error = float((got[name] - gradient).norm())
        assert error <= 1e-10 * max(float(gradient.norm()), floor), f"{name}: {error:.1e}"


def _recorder(model: torch.nn.Module, seen: dict[str, torch.Tensor]) -> Callable[..., None]:
    def record(*_: object) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                seen[name] = parameter.grad.clone()

    return record


@settings(max_examples=25)
@given(rollouts())
def test_the_update_is_the_flat_batchs(case):
    sequences, trained, advantages = case
    model, reference = policy_and_reference()
    flat_loss(model, reference, sequences, trained, advantages).backward()
    flat = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(gradients_of(case, 8192), flat)


@settings(max_examples=25)
@given(rollouts())
def test_a_cut_forest_gives_the_uncut_gradient(case):
    assert_close(gradients_of(case, 24), gradients_of(case, 8192))


def test_a_gradient_that_is_not_finite_stops_training_and_changes_nothing():
    model = tiny_model("qwen2")
    learner = Learner(Policy(model), None, settings_of(64, kl_weight=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forest = pack_forest([np.array([1, 2, 3])])
    with pytest.raises(TrainingError, match="not finite"):
        learner.update(forest, np.zeros(3, np.float32), np.array([np.nan]), 0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_inner_epochs_bring_the_clip_into_play():
    learner = Learner(Policy(tiny_model("qwen2")), None, settings_of(64, kl_weight=0.0, epochs=4, lr=0.05))
    forest = pack_forest([np.array([1, 2, 3, 4]), np.array([1, 2, 5, 6])])
    figures = learner.update(forest, np.zeros(forest.num_tokens, np.float32), np.array([1.0, -1.0]), 0)
    assert figures["policy/clip_frac"] > 0


def test_mismatch_is_zero_against_the_policys_own_logprobs():
    policy = Policy(tiny_model("qwen2"))
    forest = pack_forest([np.array([1, 2, 3, 4]), np.array([1, 2, 5, 6])])
    own = policy.logprobs(forest, temperature=0.7).detach().numpy()
    figures = Learner(policy, None, settings_of(64, kl_weight=0.0)).update(
        forest, own, np.array([1.0, -1.0]), 0
    )
    assert abs(figures["mismatch/kl"]) < 1e-15
    assert figures["mismatch/ratio_max"] == pytest.approx(1.0, abs=1e-5)


def test_the_learning_rate_warms_up_and_decays_to_its_share():
    config = Config(steps=10, optim=OptimConfig(lr=1.0, warmup_steps=2, final_lr_frac=0.2))
    learner = Learner(Policy(tiny_model("qwen2")), None, config)
    rates = [learner.learning_rate(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 - 0.8 * 7 / 8)
    assert all(a >= b for a, b in pairwise(rates[2:]))
