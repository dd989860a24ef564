"""What a loss couples and which forwards hold all of it: those run once, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_fast.config import OWN_SETTINGS
from mosaic_fast.learner import learner as learner_module
from mosaic_fast.learner.execution import Coupling, Execution, Schedule, coupling_of, units_of
from mosaic_fast.learner.learner import Learner, Reference
from mosaic_fast.losses import build_loss
from mosaic_fast.policy import Policy
from tests.learner.flat_oracle import Case, forked_case, forked_cases
from tests.learner.learner_configs import config_of, moved
from tests.policy.policy_helpers import assert_gradients_close, tiny_model

COUPLED = [name for name in OWN_SETTINGS if build_loss(config_of(name).loss).coupled]
PLANS = {"tree": 8192, "cut": 16, "kept": 16, "flat": 16}


def test_units_are_rollouts_what_pairs_connect_or_the_step():
    pairs = np.array([[3, 1], [4, 3], [0, 5]])
    assert units_of("rollout", pairs, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert units_of("pair", pairs, 6).tolist() == [0, 1, 2, 1, 1, 0]
    assert units_of("step", pairs, 6).tolist() == [0] * 6
    assert units_of("pair", np.zeros((0, 2), np.int64), 2).tolist() == [0, 1]


@settings(max_examples=100)
@given(forked_cases(), st.sampled_from(["rollout", "pair", "step"]), st.sampled_from(list(PLANS)))
def test_a_forward_needs_one_pass_where_nothing_that_it_holds_is_coupled_with_another(
    case: Case, couples: str, plan: str
):
    batch = case.batch()
    execution = Execution(PLANS[plan], 0.7, tiny_model("qwen2").config, plan=plan)
    unit_of = units_of(couples, batch.pairs, len(case.sequences))  # pyrefly: ignore[bad-argument-type]
    schedule = execution.schedule(batch.forest)
    found = coupling_of(schedule, unit_of)

    rollout_of = np.repeat(np.arange(len(case.sequences)), [len(s) for s in case.sequences])
    owned = [set(part.owned_tokens.tolist()) for part in schedule.parts]
    assert sorted(t for tokens in owned for t in tokens) == np.flatnonzero(batch.forest.trained).tolist()
    units = [{int(unit_of[rollout_of[token]]) for token in tokens} for tokens in owned]
    once = [
        all(unit not in other for unit in own for j, other in enumerate(units) if j != i)
        for i, own in enumerate(units)
    ]
    ready = set().union(*(own for own, alone in zip(units, once, strict=True) if alone))
    assert found.one_pass.tolist() == [unit in ready for unit in unit_of.tolist()]
    twice = {tuple(sorted(tokens)) for tokens, alone in zip(owned, once, strict=True) if not alone}
    assert twice <= {tuple(sorted(part.owned_tokens.tolist())) for part in found.rest.parts}
    assert found.has_rest == (not all(once))
    for part in found.rest.parts:  # what it stands on is there, and keeps its keys
        assert part.parent < 0 or found.rest.parts[part.parent].kept


def updated(
    name: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], dict[str, float], int, Schedule]:
    """Gradient and metrics of an update, and how often the policy ran."""
    model = tiny_model("qwen2")
    policy, runs, schedules = Policy(model), [0], []
    run = policy.run

    def counted(*arguments: object, **options: object) -> object:
        runs[0] += 1
        return run(*arguments, **options)  # pyrefly: ignore[bad-argument-type]

    monkeypatch.setattr(policy, "run", counted)
    config = config_of(name)
    optim = config.optim.model_copy(update={"epochs": 1})
    learner = Learner(policy, Reference(Policy(moved(model))), config.model_copy(update={"optim": optim}))
    execution = Execution(PLANS[plan], 0.7, model.config, plan=plan)
    learner._execution, choose = execution, execution.schedule
    monkeypatch.setattr(execution, "schedule", lambda *a: schedules.append(choose(*a)) or schedules[-1])
    seen: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    learner.optimizer.adamw.register_step_pre_hook(keep)
    figures = learner.update(forked_case().batch(), 0)
    return seen, figures, runs[0], schedules[0]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", COUPLED)
def test_one_pass_gives_the_gradient_and_metrics_of_two(
    name: str, plan: str, monkeypatch: pytest.MonkeyPatch
):
    once, figures, runs, schedule = updated(name, plan, monkeypatch)

    def all_twice(schedule: Schedule, unit_of: np.ndarray, *_: object) -> Coupling:
        return Coupling(np.zeros(len(unit_of), np.bool_), {}, schedule)

    monkeypatch.setattr(learner_module, "coupling_of", all_twice)
    twice, expected, most, _ = updated(name, plan, monkeypatch)
    assert_gradients_close(once, twice, 1e-12)
    clocks = ("time/", "tree/one_pass_frac")
    for key, value in expected.items():
        if not key.startswith(clocks):
            assert figures[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key
    assert most == 2 * len(schedule.parts)
    assert expected["tree/one_pass_frac"] == 0
    if plan == "tree":
        assert (runs, figures["tree/one_pass_frac"]) == (1, 1.0)
    else:
        assert (runs < most) == (figures["tree/one_pass_frac"] > 0)


def test_a_group_that_fits_needs_one_pass_beside_one_that_is_cut(monkeypatch: pytest.MonkeyPatch):
    """Of the two groups of judged pairs the first one has more nodes than the budget."""
    _, figures, runs, schedule = updated("dpo", "cut", monkeypatch)
    assert 0 < figures["tree/one_pass_frac"] < 1
    assert len(schedule.parts) < runs < 2 * len(schedule.parts)
