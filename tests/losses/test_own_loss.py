"""A user's own loss: forest and flat agree, and what is wrong with it is said in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mosaic_fast.config import Config, ForestConfig, LossConfig
from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.config.resume import refuse_differences
from mosaic_fast.errors import UserError
from mosaic_fast.learner.execution import Execution
from mosaic_fast.learner.learner import Learner, Reference
from mosaic_fast.losses import LossBatch, build_loss, check_loss
from mosaic_fast.policy import Policy
from tests.learner.flat_oracle import Case, alone, forked_case
from tests.learner.learner_configs import config_of, moved
from tests.policy.policy_helpers import assert_gradients_close, tiny_model

OWN = "tests.losses.own_losses:"


def named(name: str, **values: object) -> LossConfig:
    return LossConfig.model_validate({"name": OWN + name, **values})


def batch_of(count: int) -> tuple[torch.Tensor, LossBatch]:
    policy = -torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.full((count,), 1.0 / count, dtype=torch.float64)
    weights[0], bounds = 0.0, torch.tensor([0, count // 2, count])
    advantages = torch.linspace(-1.0, 1.0, count, dtype=torch.float64)
    old, reference = policy.detach() - 0.1, policy.detach()
    return policy.requires_grad_(), LossBatch(old, reference, advantages, weights, bounds)


def gradients(config: Config, case: Case, plan: str) -> dict[str, torch.Tensor]:
    """Of the first update, on a forest run in a way."""
    model = tiny_model("qwen2")
    learner = Learner(Policy(model), Reference(Policy(moved(model))), config)
    learner._execution = Execution(16, config.rollout.temperature, model.config, plan=plan)
    seen: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    learner.optimizer.adamw.register_step_pre_hook(keep)
    learner.update(case.batch(), 0)
    return seen


@pytest.mark.parametrize("name", ["TokenWise", "Coupled"])
@pytest.mark.parametrize("plan", ["cut", "kept", "flat"])
def test_a_forest_gives_the_gradient_of_each_rollout_run_alone(name: str, plan: str):
    """With the KL and entropy terms that any loss may have."""
    config = config_of("grpo")
    loss = named(name, kl_weight=0.1, entropy_weight=0.05, normalisation="token")
    config = config.model_copy(update={"loss": loss, "optim": config.optim.model_copy(update={"epochs": 1})})
    case = forked_case()
    model = tiny_model("qwen2")
    policy, entropies = alone(model, case, config.rollout.temperature)
    with torch.no_grad():
        reference, _ = alone(moved(model), case, config.rollout.temperature)
    count = sum(mask.sum() for mask in case.trained)
    total = torch.zeros((), dtype=torch.float64)
    for r, mask in enumerate(case.trained):
        chosen = torch.from_numpy(mask)
        own, drift = policy[r][chosen], (reference[r] - policy[r])[chosen]
        k3, bonus = (torch.expm1(drift) - drift).sum(), entropies[r][chosen].sum()
        total = total + (0.1 * k3 - 0.05 * bonus) / count
        if name == "TokenWise":
            total = total - case.advantages[r] * (own - own.detach()).exp().sum() / count
        else:
            total = total + drift.sum() ** 2
    total.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_gradients_close(gradients(config, case, plan), wanted, 1e-10)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Nothing", {}, "has no class 'Nothing'"),
        ("TokenWise", {"scales": 2.0}, "loss.options: TokenWise got an unexpected keyword argument 'scales'"),
        ("NotCallable", {}, r"it has no method __call__\(policy_logprobs, batch, entropy\)"),
        ("TwoArguments", {}, "too many positional arguments"),
        ("Says", {}, "normalisation is none of token, sequence, constant"),
    ],
)
def test_a_class_that_is_no_loss_is_refused(name: str, options: dict[str, float], words: str):
    with pytest.raises(UserError, match=words) as error:
        build_loss(named(name, options=options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "Mean",
            "token_wise, but its gradient on halves of a batch is not that on the whole",
        ),
        ("Raises", r"the loss failed: KeyError: 'temperature' \(.*own_losses\.py, line \d+\)"),
        (
            "RaisesInBackward",
            r"the loss's backward failed: ValueError: no such gradient \(.*own_losses\.py, line \d+\)",
        ),
        ("Infinite", "the loss must be finite, it is -inf"),
        ("Vector", r"must be a scalar tensor, .* it is a tensor \[8\] of torch\.float64"),
        ("Constant", "does not depend on policy_logprobs, so it trains nothing"),
        ("Metrics", '"x" of .*:Metrics must be a finite number, it is nan'),
    ],
)
def test_what_a_loss_gives_is_looked_at(name: str, words: str):
    policy, batch = batch_of(8)
    with pytest.raises(UserError, match=words) as error:
        build_loss(named(name))(policy, batch)
    assert "\n" not in str(error.value)


def test_what_does_not_count_is_zero_for_a_users_loss_whatever_it_is():
    policy, batch = batch_of(8)
    loss = build_loss(named("TokenWise", options={"scale": 2.0}))
    wanted, _ = loss(policy, batch)
    broken, old = policy.detach().clone(), batch.old_logprobs.clone()
    broken[0] = old[0] = torch.nan
    found, metrics = loss(broken.requires_grad_(), replace(batch, old_logprobs=old))
    assert found.item() == wanted.item() == metrics["policy/loss"].sum


def test_a_gradient_that_is_not_finite_matters_where_a_token_counts():
    policy, batch = batch_of(8)
    value, _ = build_loss(named("SteepAtZero", options={"everywhere": False}))(policy, batch)
    value.backward()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()
    assert policy.grad[0] == 0
    with pytest.raises(UserError, match="the loss's gradient must be finite"):
        build_loss(named("SteepAtZero", options={"everywhere": True}))(policy, batch)


def test_a_loss_may_write_to_what_it_is_given():
    policy, batch = batch_of(8)
    before = policy.detach().clone()
    value, _ = build_loss(named("Writes"))(policy, batch)
    value.backward()
    assert torch.equal(policy.detach(), before)
    assert policy.grad is not None
    torch.testing.assert_close(policy.grad, -batch.weights * batch.advantages)


def test_a_loss_on_pairs_is_refused_beside_what_has_no_meaning_for_it():
    forest = ForestConfig(credit="mean")
    check_loss(Config(loss=named("TokenWise"), forest=forest))
    with pytest.raises(UserError, match=r"forest\.credit = 'mean' needs a loss on rewards"):
        check_loss(Config(loss=named("Compares"), forest=forest))


def test_needs_are_read_from_the_class():
    assert named("Coupled").needs_reference
    assert not named("TokenWise").needs_reference
    assert named("TokenWise", kl_weight=0.1).needs_reference
    assert build_loss(named("Coupled")).normalisation == "sequence"
    assert build_loss(named("Coupled")).coupled
    assert named("Compares").is_pairwise


def test_options_are_read_from_the_command_line_and_stay_for_a_resumed_run():
    config, _, _ = parse_train_arguments(
        ["--loss.name", "a:B", "--loss.options", "rate", "0.5", "kind", "x", "on", "True", "n", "3"]
    )
    assert config.loss.options == {"rate": 0.5, "kind": "x", "on": True, "n": 3}
    other = config.model_copy(update={"loss": config.loss.model_copy(update={"options": {"rate": 0.5}})})
    with pytest.raises(UserError, match=r"loss\.options\.kind: the run has 'x', you ask for None"):
        refuse_differences(config, other)
