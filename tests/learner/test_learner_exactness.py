"""Every loss, credit mode, cut and family: the learner's gradient is the flat batch's, in fp64 to 1e-10.

The second of two epochs is compared: the weights have moved since the start log-probs, and the clip bites.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from mosaic_fast.config import (
    OWN_SETTINGS,
    PAIRWISE_LOSSES,
    Config,
    OffPolicyConfig,
)
from mosaic_fast.learner.execution import Execution
from mosaic_fast.learner.learner import Learner, Reference
from mosaic_fast.policy import Policy
from mosaic_fast.policy.layout import checkpoint_activations
from tests.learner.flat_oracle import Case, alone, flat_loss, forked_case, forked_cases
from tests.learner.learner_configs import config_of, moved
from tests.policy.policy_helpers import assert_gradients_close, tiny_model

PLANS = {"tree": 8192, "cut": 16, "kept": 16, "flat": 16}  # tokens at once
FAMILIES = ("qwen2", "qwen3", "phi3", "llama")


def last_epoch(
    model: PreTrainedModel, config: Config, case: Case, plan: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The gradient just before the last optimiser step; the model is left with the weights it is of."""
    learner = Learner(Policy(model), Reference(Policy(moved(model))), config)
    learner._execution = Execution(
        PLANS[plan], config.rollout.temperature, model.config, plan="auto" if plan == "tree" else plan
    )
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def record(*_: object) -> None:
        seen.append(
            (
                {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
                {name: p.detach().clone() for name, p in model.named_parameters()},
            )
        )

    learner.optimizer.adamw.register_step_pre_hook(record)
    figures = learner.update(case.batch(), 0)
    gradients, weights = seen[-1]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return gradients, figures


def flat_gradients(
    family: str, model: PreTrainedModel, config: Config, case: Case
) -> dict[str, torch.Tensor]:
    """What the flat batch gives the weights of `model`; the start log-probs are tiny_model(family)'s."""
    old_logprobs, reference = before_the_first_epoch(family, case, config.rollout.temperature)
    model.zero_grad()
    policy, entropies = alone(model, case, config.rollout.temperature)
    flat_loss(case, config, policy, entropies, old_logprobs, reference).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def before_the_first_epoch(
    family: str, case: Case, temperature: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probs of the policy and the reference. No loss changes them: most tests' case keeps them."""
    if case is forked_case():
        return _of_the_forked_case(family, temperature)
    return _log_probs(family, case, temperature)


@functools.lru_cache
def _of_the_forked_case(family: str, temperature: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return _log_probs(family, forked_case(), temperature)


@torch.no_grad()
def _log_probs(family: str, case: Case, temperature: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    start = tiny_model(family)
    return alone(start, case, temperature)[0], alone(moved(start), case, temperature)[0]


def check(family: str, config: Config, case: Case, plans: Sequence[str]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for plan in plans:
        model = tiny_model(family)
        got, figures = last_epoch(model, config, case, plan)
        assert_gradients_close(got, flat_gradients(family, model, config, case), 1e-10)
    return figures


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_any_loss_credit_and_cut_is_the_flat_batch(family: str, name: str):
    """Alternately with and without KL and entropy: without, the group of ties is out of reach.

    Credit and cuts know nothing of a family: the first one has all ways, each of the others some.
    One loss has every cut once, and then one for each way of credit; another loss has another cut there.
    """
    others, place = ["mean", "first", "subtree"], FAMILIES.index(family)
    others = [] if name in (*PAIRWISE_LOSSES, "sft") else others if place == 0 else [others[place - 1]]
    credits = ["sum", *others]
    for index, credit in enumerate(credits):
        for penalised in (True, False):
            rotating = list(PLANS)[(index + place + penalised + list(OWN_SETTINGS).index(name)) % 4]
            plans = list(PLANS) if credit == "sum" and place == 0 and penalised else [rotating]
            if place and penalised == (index + place) % 2:
                continue
            check(family, config_of(name, credit, penalised=penalised), forked_case(), plans)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_the_ratio_is_taken_against_the_first_epoch_in_the_third(name: str):
    config = config_of(name)
    optim = config.optim.model_copy(update={"epochs": 3})
    check("qwen2", config.model_copy(update={"optim": optim}), forked_case(), ["cut"])


@pytest.mark.parametrize("penalty", ["kl_weight", "entropy_weight"])
def test_one_penalty_alone_keeps_every_token_in_reach(penalty: str):
    config = config_of("grpo", penalised=False)
    loss = config.loss.model_copy(update={penalty: 0.1})
    figures = check("qwen2", config.model_copy(update={"loss": loss}), forked_case(), ["cut"])
    assert figures["tree/pruned_edge_frac"] == 0


@settings(max_examples=30)
@given(
    forked_cases(),
    st.sampled_from(["grpo", "gspo", "cispo", "dpo", "dpo_norm", "ipo"]),
    st.sampled_from(["sum", "mean", "first", "subtree"]),
    st.booleans(),
    st.sampled_from(list(PLANS)),
)
def test_random_forks_and_masks_are_the_flat_batch(
    case: Case, name: str, credit: str, penalised: bool, plan: str
):
    """Duplicates, rollouts that end at a fork, nothing trained in some, agreement by chance."""
    config = config_of(name, "sum" if name in PAIRWISE_LOSSES else credit, penalised=penalised)
    check("qwen2", config, case, [plan])


def test_the_cases_reach_what_they_are_for():
    """The clip bites, the group of ties is pruned, credit changes the gradient: else the others are idle."""
    gradients = {}
    for credit in ("sum", "mean", "first", "subtree"):
        model = tiny_model("qwen2")
        config = config_of("grpo", credit, penalised=False)
        gradients[credit], figures = last_epoch(model, config, forked_case(), "cut")
        assert figures["policy/clip_frac"] > 0.05
        assert figures["tree/pruned_frac"] > 0.2
        assert figures["tree/microbatches"] > 1
    name = "model.layers.0.mlp.up_proj.weight"
    for credit in ("mean", "first", "subtree"):
        difference = float((gradients[credit][name] - gradients["sum"][name]).norm())
        assert difference > 1e-3 * float(gradients["sum"][name].norm()), credit


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
@pytest.mark.parametrize(
    "options",
    [
        OffPolicyConfig(truncate_at=1.1),
        OffPolicyConfig(mask_below=0.8, mask_above=1.2),
        OffPolicyConfig(truncate_at=1.05, mask_below=0.7),
    ],
    ids=["truncated", "masked", "both"],
)
def test_off_policy_weights_are_those_of_the_flat_batch(name: str, options: OffPolicyConfig):
    """The engine's log-probs are off by up to 40%; the weights multiply the advantages alone."""
    case, rng = forked_case(), np.random.default_rng(1)
    with torch.no_grad():
        start, _ = alone(tiny_model("qwen2"), case, 0.7)
    sampler = [(own.numpy() + rng.uniform(-0.4, 0.4, len(own))).astype(np.float32) for own in start]
    case = replace(case, rollout_logprobs=sampler)
    figures = check("qwen2", config_of(name, off_policy=options), case, ["tree", "cut"])
    assert figures["mismatch/ratio_max"] > 1.2  # before anything is truncated
    if options.truncate_at is not None:
        assert 0 < figures["mismatch/truncated_frac"] < 1
    if options.masks:
        assert 0 < figures["mismatch/masked_frac"] < 1


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_rotary_factors_that_depend_on_a_rollouts_length_survive_pruning(name: str):
    """longrope: a rollout without its tail would be short, and would see other frequencies."""
    case = forked_case()
    long_enough = [np.append(s, [4] * (7 - len(s))) if len(s) < 7 else s for s in case.sequences]
    masks = [np.pad(m, (0, len(s) - len(m))) for s, m in zip(long_enough, case.trained, strict=True)]
    masks[0][5:] = False  # in reach up to token 4 alone
    case = replace(
        case,
        sequences=long_enough,
        trained=masks,
        rollout_logprobs=[np.zeros(len(s), np.float32) for s in long_enough],
    )
    check("longrope", config_of(name, penalised=False), case, ["tree", "cut"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_activation_checkpointing_changes_memory_alone(family: str, name: str):
    for plan in ("tree", "cut", "kept"):
        model = tiny_model(family)
        checkpoint_activations(model)
        got, _ = last_epoch(model, config_of(name), forked_case(), plan)
        assert_gradients_close(got, flat_gradients(family, model, config_of(name), forked_case()), 1e-10)


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_micro_batches_accumulate_to_one_large_batch(name: str):
    """The gradient of many small forwards is that of one, whatever the loss couples."""
    found = []
    for plan, budget in (("tree", 8192), ("cut", 14)):
        model = tiny_model("llama")
        learner = Learner(Policy(model), Reference(Policy(moved(model))), config_of(name))
        learner._execution = Execution(budget, 0.7, model.config, plan=plan)
        seen: dict[str, torch.Tensor] = {}

        def record(*_: object, model: PreTrainedModel = model, seen: dict[str, torch.Tensor] = seen) -> None:
            if not seen:
                seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        learner.optimizer.adamw.register_step_pre_hook(record)
        figures = learner.update(forked_case().batch(), 0)
        found.append((seen, figures["tree/microbatches"]))
    assert found[0][1] == 1
    assert found[1][1] >= 4
    assert_gradients_close(found[1][0], found[0][0], 1e-10)
