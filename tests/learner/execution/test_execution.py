"""However a forest is run, log-probs, entropies and gradients are those of each rollout alone, in fp64."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from mosaic_fast.errors import UserError
from mosaic_fast.learner.execution import PLANS, Execution, MicroBatch
from mosaic_fast.learner.execution.execution import KeptPrefix, stopwatch
from mosaic_fast.policy import Policy
from mosaic_fast.policy.layout import checkpoint_activations
from tests.policy.alterations import hooked_model, lora_everywhere
from tests.policy.policy_helpers import (
    FAMILIES,
    LONGROPE_SWITCH,
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


def longest(data: Rollouts) -> int:
    return max((len(s) for s in data.sequences), default=1) or 1


def run(
    model: PreTrainedModel, data: Rollouts, budget: int, plan: str
) -> tuple[Tensor, Tensor, dict[str, Tensor], Execution]:
    """Log-probs and entropies seen by the loss [T], those of the pass without gradient checked against them,
    and the gradients of a loss that weights every token by itself."""
    forest = data.pack()
    a, b = loss_weights(forest.num_tokens)
    seen, owners = torch.zeros(2, forest.num_tokens, dtype=torch.float64), np.zeros(forest.num_tokens, int)

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        seen[0, micro_batch.source], seen[1, micro_batch.source] = (
            micro_batch.logprobs.detach(),
            micro_batch.entropy.detach(),
        )
        np.add.at(owners, micro_batch.source.numpy(), 1)
        return (
            a[micro_batch.source] * micro_batch.logprobs + b[micro_batch.source] * micro_batch.entropy
        ).sum()

    model.zero_grad()
    policy, execution = Policy(model), Execution(budget, 1.0, model.config, plan=plan)
    schedule = execution.schedule(forest)
    assert all(part.num_nodes <= budget for part in schedule.parts)
    execution.backward(policy, schedule, loss_of)
    assert (owners == forest.trained).all()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    for one, other in zip(execution.logprobs(policy, schedule), seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    return seen[0], seen[1], found, execution


def assert_equals_rollouts_alone(model: PreTrainedModel, data: Rollouts, budget: int, plan: str) -> None:
    logprobs, entropy = stock_logprobs(model, data)
    a, b = loss_weights(len(logprobs))
    expected = gradients(model, (a * logprobs + b * entropy).sum())
    got, got_entropy, found, _ = run(model, data, budget, plan)
    torch.testing.assert_close(got, logprobs.detach(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(got_entropy, entropy.detach(), rtol=1e-10, atol=1e-11)
    assert_gradients_close(found, expected, 1e-10)


@pytest.mark.parametrize("case", FAMILIES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=rollouts(), slack=st.integers(0, 6), plan=st.sampled_from(["kept", "kept", "cut", "flat", "auto"])
)
def test_every_plan_equals_rollouts_alone(case: str, data: Rollouts, slack: int, plan: str) -> None:
    assert_equals_rollouts_alone(fp64_model(case), data, longest(data) + slack, plan)


def nested() -> Rollouts:
    """Forks below forks, so that three forwards are held at once; trained and untrained chains."""
    rng = np.random.default_rng(0)
    stem, sequences = rng.integers(0, 23, 4), []
    for _ in range(3):
        stem = np.append(stem, rng.integers(0, 23, 3))
        sequences += [np.append(stem, rng.integers(0, 23, 6)) for _ in range(3)]
    return Rollouts(sequences, [(np.arange(len(s)) > 5) & (rng.random(len(s)) < 0.8) for s in sequences])


@pytest.mark.parametrize("case", ["qwen3-window", "phi3-window", "llama"])
def test_held_paths_nest(case: str) -> None:
    data, model = nested(), fp64_model(case)
    schedule = Execution(20, 1.0, model.config, plan="kept").schedule(data.pack())
    depth = [0] * len(schedule.parts)
    for index, part in enumerate(schedule.parts):
        depth[index] = depth[part.parent] + 1 if part.parent >= 0 else 0
    assert max(depth) >= 2
    assert schedule.packed_tokens == data.pack().num_nodes  # nothing twice
    assert_equals_rollouts_alone(model, data, 20, "kept")


@pytest.mark.parametrize("alter", [lora_everywhere, hooked_model], ids=lambda alter: alter.__name__)
def test_alterations_are_honoured(alter: types.FunctionType) -> None:
    """Layers of LoRA, and a model whose parts may not be called one by one."""
    model = tiny_model("qwen3-window")
    alter(model)
    assert_equals_rollouts_alone(model, nested(), 20, "kept")


def test_checkpointed_layers_run_twice_and_only_twice() -> None:
    """The held prefix is computed again once, however many branches stand on it."""
    model, data = tiny_model("qwen3-window"), nested()
    checkpoint_activations(model)
    runs: list[int] = []
    decoder(model).layers[0].self_attn.register_forward_hook(lambda m, i, out: runs.append(out[0].shape[1]))
    logprobs, entropy = stock_logprobs(model, data)
    a, b = loss_weights(len(logprobs))
    expected = gradients(model, (a * logprobs + b * entropy).sum())
    runs.clear()
    _, _, found, execution = run(model, data, 20, "kept")
    assert execution.figures()["tree/kept_recomputed"] == 1
    assert_gradients_close(found, expected, 1e-10)
    assert sum(runs) == 3 * data.pack().num_nodes  # forward, recomputation, and the pass without gradient


def test_what_is_held_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A graph kept, or under checkpointing computed again; nothing where nothing is held."""
    model, data = tiny_model("llama"), nested()
    with caplog.at_level("DEBUG", "mosaic_fast"):
        figures = run(model, data, 20, "kept")[3].figures()
    assert figures["tree/kept_recomputed"] == 0
    schedule = Execution(20, 1.0, model.config, plan="kept").schedule(data.pack())
    assert figures["tree/kept_prefixes"] == len({part.parent for part in schedule.parts} - {-1}) > 1
    assert f"{figures['tree/kept_prefixes']:.0f} forwards are held, their graphs kept" in caplog.text
    assert "tree/kept_prefixes" not in run(model, data, 20, "cut")[3].figures()
    checkpoint_activations(model)
    with caplog.at_level("DEBUG", "mosaic_fast"):
        run(model, data, 20, "kept")
    assert "their graphs computed again once" in caplog.text


def test_reentrant_checkpointing_is_cut_instead(caplog: pytest.LogCaptureFixture) -> None:
    model, data = tiny_model("llama"), nested()
    checkpoint_activations(model, reentrant=True)
    assert_equals_rollouts_alone(model, data, 20, "kept")
    assert "the forest is cut" in caplog.text


def test_frozen_parameters() -> None:
    """Keys and values without gradient are held all the same."""
    model, data = tiny_model("qwen2"), nested()
    logprobs, entropy = stock_logprobs(model, data)
    a, b = loss_weights(len(logprobs))
    expected = gradients(model, (a * logprobs + b * entropy).sum())
    model.requires_grad_(False)
    last = [name for name, _ in model.named_parameters() if "layers.1." in name]
    for name in last:
        model.get_parameter(name).requires_grad_(True)
    _, _, found, _ = run(model, data, 20, "kept")
    assert_gradients_close({n: found[n] for n in last}, {n: expected[n] for n in last}, 1e-10)


def test_bf16_branches_add_up_in_fp32() -> None:
    """600 gradients of 1: a sum in bf16 would stay at 256."""
    weight = torch.ones(3, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    held = KeptPrefix(0, {("keys", 0): (weight * 1, weight.detach())})
    for _ in range(600):
        held.leaves["keys", 0][0].sum().backward()
        held.collect()
    held.backward()
    assert weight.grad is not None
    assert weight.grad.unique().tolist() == [600.0]


def test_rotary_embeddings_that_depend_on_length() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 23, LONGROPE_SWITCH)
    sequences = [np.append(prompt, rng.integers(0, 23, 3)) for _ in range(4)]
    data = Rollouts(sequences, [np.arange(len(s)) > 2 for s in sequences])
    assert_equals_rollouts_alone(tiny_model("longrope"), data, LONGROPE_SWITCH + 4, "kept")


def test_nothing_trained_runs_nothing() -> None:
    data = Rollouts([np.array([1, 2, 3])], [np.zeros(3, np.bool_)])
    for plan in PLANS:
        _, _, found, execution = run(fp64_model("llama"), data, 8, plan)
        assert not any(g.any() for g in found.values())
        assert execution.schedule(data.pack()).parts == ()


def test_refusals() -> None:
    model, forest = fp64_model("llama"), example_rollouts().pack()
    with pytest.raises(ValueError, match=r"the budget must be at least 12"):
        Execution(11, 1.0, model.config).schedule(forest)
    with pytest.raises(ValueError, match="plan must be 'auto' or one of tree, flat, cut, kept"):
        Execution(11, 1.0, model.config, plan="fast")
    with pytest.raises(
        ValueError, match=f"plan 'tree' needs a budget of {forest.num_nodes} tokens, it is 12"
    ):
        Execution(12, 1.0, model.config, plan="tree").schedule(forest)
    execution = Execution(64, 0.0, model.config)
    schedule = execution.schedule(forest)
    with pytest.raises(UserError, match="temperature must be above 0"):
        execution.logprobs(Policy(model), schedule)


def test_a_pass_on_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call only queues work: events are recorded around it, and waited for when they are read."""
    calls: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            calls.append(f"record on {stream}")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    read = stopwatch(torch.device("cuda", 1))()
    assert calls == ["record on the stream of cuda:1"] * 2
    assert read() == 1.5
    assert calls[2:] == ["wait"]
    assert 0 <= stopwatch(torch.device("cpu"))()() < 60
