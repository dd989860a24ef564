"""The learner's bookkeeping: what stops it, what it reports, its learning rate."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from mosaic_fast.config import Config, ForestConfig, LossConfig, ModelConfig, OptimConfig, RolloutConfig
from mosaic_fast.errors import TrainingError, UserError
from mosaic_fast.learner.learner import Learner
from mosaic_fast.learner.step_batch import StepBatch
from mosaic_fast.policy import Policy
from tests.learner.flat_oracle import Case, forked_case
from tests.policy.policy_helpers import tiny_model


def settings_of(*, epochs: int = 1, lr: float = 1e-3, name: str = "grpo", kl_weight: float = 0.0) -> Config:
    return Config(
        model=ModelConfig(path="unused"),
        rollout=RolloutConfig(max_rollout_tokens=24, max_step_tokens=8, temperature=0.7),
        forest=ForestConfig(tokens_per_microbatch=64),
        loss=LossConfig.model_validate({"name": name, "kl_weight": kl_weight}),
        optim=OptimConfig(epochs=epochs, grad_clip=1e9, lr=lr),
    )


def batch_of(*sequences: list[int], advantages: list[float], trained_from: int = 1) -> StepBatch:
    """One group of independent rollouts."""
    arrays, count = [np.array(s) for s in sequences], len(sequences)
    case = Case(
        sequences=arrays,
        trained=[np.arange(len(s)) >= trained_from for s in arrays],
        parents=[-1] * count,
        fork_positions=[0] * count,
        groups=[list(range(count))],
        preferences=[np.full((count, count), 0.5)],
        advantages=np.array(advantages),
        returns=np.array(advantages),
        rollout_logprobs=[np.zeros(len(s), np.float32) for s in arrays],
    )
    return case.batch()


def test_a_gradient_that_is_not_finite_stops_training_and_changes_nothing():
    model = tiny_model("qwen2")
    learner = Learner(Policy(model), None, settings_of())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(TrainingError, match="not finite"):
        learner.update(batch_of([1, 2, 3], advantages=[np.nan]), 0)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_loss_without_the_reference_it_needs_is_refused():
    for name in ("dpo", "dpo_norm", "ipo"):
        config = settings_of().model_copy(update={"loss": LossConfig.model_validate({"name": name})})
        with pytest.raises(UserError, match=f"{name}.*needs a reference"):
            Learner(Policy(tiny_model("qwen2")), None, config)


def test_inner_epochs_bring_the_clip_into_play():
    learner = Learner(Policy(tiny_model("qwen2")), None, settings_of(epochs=4, lr=0.05))
    figures = learner.update(batch_of([1, 2, 3, 4], [1, 2, 5, 6], advantages=[1.0, -1.0]), 0)
    assert figures["policy/clip_frac"] > 0


def test_mismatch_is_zero_against_the_policys_own_logprobs():
    policy = Policy(tiny_model("qwen2"))
    batch = batch_of([1, 2, 3, 4], [1, 2, 5, 6], advantages=[1.0, -1.0])
    own = policy.logprobs(batch.forest, temperature=0.7).detach().numpy()
    figures = Learner(policy, None, settings_of()).update(replace(batch, rollout_logprobs=own), 0)
    assert abs(figures["mismatch/kl"]) < 1e-15
    assert figures["mismatch/ratio_max"] == pytest.approx(1.0, abs=1e-5)


def test_pass_a_gives_the_start_logprobs_of_one_pass():
    """GSPO trains in two passes, GRPO in one: both compare with the same log-probs before the first step."""
    batch = forked_case().batch()
    figures = [
        Learner(Policy(tiny_model("qwen2")), None, settings_of(name=name)).update(batch, 0)
        for name in ("grpo", "gspo")
    ]
    for name in ("mismatch/kl", "mismatch/ratio_max"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-12), name


def test_counts_include_what_is_out_of_reach():
    """The group of ties is not forwarded, and still weighs in the share of clipped tokens and the loss."""
    batch = forked_case().batch()
    figures = Learner(Policy(tiny_model("qwen2")), None, settings_of(epochs=3, lr=0.05)).update(batch, 0)
    assert figures["tree/pruned_frac"] > 0.2
    assert figures["tree/raw_tokens"] == batch.forest.num_tokens
    assert figures["tree/unique_tokens"] == batch.forest.num_nodes
    assert figures["policy/dropped_tokens"] == 0
    clipped = figures["policy/clip_frac"] * batch.forest.trained.sum() * 3
    assert clipped > 0
    assert clipped == pytest.approx(round(clipped))


def test_a_step_of_ties_alone_is_a_step_with_a_gradient_of_zero():
    """Nothing is forwarded; AdamW's averages go on as they would with the flat batch's zero gradient."""
    model = tiny_model("qwen2")
    learner = Learner(Policy(model), None, settings_of())
    learner.update(batch_of([1, 2, 3], [1, 2, 4], advantages=[1.0, -1.0]), 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    figures = learner.update(batch_of([1, 2, 3], [1, 2, 4], advantages=[0.0, 0.0]), 1)
    assert figures["optim/grad_norm"] == 0
    assert figures["tree/packed_tokens"] == 0
    assert figures["tree/pruned_frac"] == 1
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_token_with_a_non_finite_logprob_is_dropped_and_counted():
    """The engine's NaN and -inf, in one and in two passes; the step is taken with the others."""
    for name in ("grpo", "gspo"):
        model = tiny_model("qwen2")
        batch = batch_of([1, 2, 3, 4], [1, 2, 5, 6], advantages=[1.0, -1.0])
        sampler = batch.rollout_logprobs.copy()
        sampler[2], sampler[7] = np.nan, -np.inf
        figures = Learner(Policy(model), None, settings_of(name=name, epochs=2)).update(
            replace(batch, rollout_logprobs=sampler), 0
        )
        assert figures["policy/dropped_tokens"] == 4  # two tokens in two epochs
        assert all(np.isfinite(value) for value in figures.values()), figures
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_the_learning_rate_warms_up_and_decays_to_its_share():
    config = Config(
        steps=10, loss=LossConfig(kl_weight=0.0), optim=OptimConfig(lr=1.0, warmup_steps=2, final_lr_frac=0.2)
    )
    learner = Learner(Policy(tiny_model("qwen2")), None, config)
    rates = [learner.learning_rate(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == 0.2
    assert rates[2:] == pytest.approx(np.linspace(1.0, 0.2, 8))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (1, 1), (1, 5), (2, 0), (2, 1), (3, 2), (60, 0), (60, 59)]
)
def test_the_last_step_has_the_final_learning_rate_exactly(steps: int, warmup: int, share: float):
    optim = OptimConfig(lr=3e-4, warmup_steps=warmup, final_lr_frac=share)
    config = Config(steps=steps, loss=LossConfig(kl_weight=0.0), optim=optim)
    learner = Learner(Policy(tiny_model("qwen2")), None, config)
    rates = [learner.learning_rate(step) for step in range(steps)]
    assert rates[-1] == 3e-4 * share
    assert max(rates[:-1], default=3e-4) == 3e-4  # what was asked for is reached before
    assert all(a <= b for a, b in pairwise(rates[: min(warmup, steps - 1)]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
