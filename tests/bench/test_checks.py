"""Nothing wrong is timed: each case's check() notices a broken contender."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import contenders
import dojo_rollouts
import numpy as np
import pytest
import torch
from agreement import Expected, Missing
from cases import attention, forest, logprob, preference, scaling, step, train
from device import CPU, Place
from torch import Tensor
from workloads import Workload, agent, drawn, qwen3

from mosaic_kernels import PackedForest, pack_forest

Broken = Callable[..., object]


@pytest.fixture(scope="module")
def tiny() -> Workload:
    return drawn(12, 4, 6, fork_halfway=True, model=qwen3(2, 128, 128))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tiny: Workload) -> None:
    """Every case at a size that takes no time."""
    monkeypatch.setitem(step.WORKLOADS, "step:held", lambda: replace(tiny, tokens_per_microbatch=20))
    monkeypatch.setitem(step.WORKLOADS, "step:agent", lambda: tiny)
    monkeypatch.setattr(scaling, "workload", lambda name, place: tiny)
    monkeypatch.setattr(preference, "workload", lambda name, place: tiny)
    monkeypatch.setattr(preference, "forest_of", lambda place: tiny.forest)
    monkeypatch.setitem(attention.SHAPES, "attention", (20, 4, 8, True))
    monkeypatch.setitem(logprob.SHAPES, "logprob", (40, 8, 50))
    monkeypatch.setattr(forest, "rollouts", lambda quick: tiny.sequences)


CASES = {
    "attention": attention,
    "forest": forest,
    "logprob": logprob,
    "preference:step": preference,
    "scaling:sharing-0": scaling,
    "scaling:tokens-64": scaling,
    "step:agent": step,
    "step:held": step,
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_right_passes(name: str) -> None:
    CASES[name].check(name, True, CPU)


def _scaled(function: Broken) -> Broken:
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.001  # pyrefly: ignore


@pytest.mark.parametrize(
    ("broken", "case"),
    [
        ("packed_loss", "scaling:tokens-64"),
        ("gather_loss", "scaling:sharing-0"),
        ("padded_loss", "scaling:suffix-2"),
    ],
)
def test_a_wrong_loss_of_any_contender(monkeypatch: pytest.MonkeyPatch, broken: str, case: str) -> None:
    monkeypatch.setattr(contenders, broken, _scaled(getattr(contenders, broken)))
    with pytest.raises(AssertionError, match=r"ours: d .* is off by|(packed|gather): d .* is off by"):
        scaling.check(case, True, CPU)


def test_a_wrong_weight_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders.forest_backward

    def wrong(workload: Workload, policy: object, weights: Tensor, plan: str = "auto") -> object:
        return right(workload, policy, weights.roll(1), plan)  # pyrefly: ignore

    monkeypatch.setattr(contenders, "forest_backward", wrong)
    with pytest.raises(AssertionError, match="ours: d "):
        step.check("step:agent", True, CPU)


def test_a_contender_that_misses_a_parameter() -> None:
    found = {"d a": torch.ones(2)}
    with pytest.raises(AssertionError, match="ours has, or lacks: d b"):
        Expected({**found, "d b": torch.ones(1)}).check("ours", found)


@pytest.mark.parametrize("broken", ["ours", "flat", "dense", "gather"])
def test_wrong_attention(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    right = attention.implementations

    def wrong(forest: PackedForest, place: Place) -> tuple[dict[str, attention.Attention], Missing]:
        made, missing = right(forest, place)
        return made | {broken: _scaled(made[broken])}, missing  # pyrefly: ignore

    monkeypatch.setattr(attention, "implementations", wrong)
    with pytest.raises(AssertionError, match=f"{broken}: output is off"):
        attention.check("attention", True, CPU)


def test_wrong_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for what in (0, 1):

        def wrong(*args: Tensor, what: int = what) -> tuple[Tensor, Tensor]:
            found = list(logprob.ours(*args))
            found[what] = found[what] * 1.001
            return found[0], found[1]

        monkeypatch.setitem(logprob.CONTENDERS, "ours", wrong)
        with pytest.raises(AssertionError, match=f"ours: {('log-probs', 'entropy')[what]} is off"):
            logprob.check("logprob", True, CPU)


def test_a_wrong_preference_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    right = preference.pairwise_preference_loss
    monkeypatch.setattr(preference, "pairwise_preference_loss", _scaled(right))
    with pytest.raises(AssertionError, match="ours: loss is off"):
        preference.check("preference", True, CPU)
    calls = itertools.count()
    # Only the first of the two contenders is wrong here.
    monkeypatch.setattr(
        preference, "pairwise_preference_loss",
        lambda *args, **kwargs: right(*args, **kwargs) * (1.001 if next(calls) == 0 else 1.0),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="ours: d "):
        preference.check("preference:step", True, CPU)


def test_a_wrong_forest(monkeypatch: pytest.MonkeyPatch, tiny: Workload) -> None:
    wrong = tiny.forest
    wrong.parent[-1] -= 1
    monkeypatch.setattr(forest, "pack_forest", lambda sequences: wrong)
    with pytest.raises(AssertionError, match="is no path"):
        forest.check("forest", True, CPU)


def test_a_run_that_does_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([1.0, 2.0])
    monkeypatch.setattr(train, "_train", lambda steps, folder: [{"optim/grad_norm": next(runs), "time/x": 0}])
    with pytest.raises(AssertionError, match="two runs of the same seed differ"):
        train.check("train", True, CPU)


def test_what_is_shared_in_the_workloads() -> None:
    """The axes are what they say: shares of sharing, levels of the tree, an agent's turns."""
    model = qwen3(1, 128, 512)
    for percent, length in ((0, 96), (60, 96), (95, 96), (95, 256)):
        prompt = scaling.prompt_tokens(percent, length)
        found = drawn(prompt, 32, length - prompt, model=model).forest
        assert found.num_tokens == 32 * length
        assert abs(1 - found.num_nodes / found.num_tokens - percent / 100) < 0.01
    nodes = [drawn(64, 16, 128, model=model, depth=depth).forest.num_nodes for depth in (1, 2, 4)]
    assert nodes == [64 + 16 * 128, 64 + 64 + 16 * 64, 64 + 32 * (1 + 2 + 4) + 16 * 32]
    turns = agent(model)
    assert len(turns.sequences) == 8
    assert all(1950 <= len(s) <= 2400 for s in turns.sequences)
    assert not any(mask[:1700].any() for mask in turns.trained)
    assert all(np.diff(mask[1700:].astype(int)).any() for mask in turns.trained)


def test_renumbering_keeps_what_is_shared() -> None:
    random = np.random.default_rng(0)
    sequences = [9000 * random.integers(0, 5, length) for length in random.integers(1, 12, 20)]
    found, distinct = dojo_rollouts.renumbered(sequences)
    before, after = np.concatenate(sequences), np.concatenate(found)
    assert distinct == 5
    assert list(dict.fromkeys(after.tolist())) == [0, 1, 2, 3, 4]  # by first appearance
    assert np.array_equal(before[:, None] == before, after[:, None] == after)
    assert [len(one) for one in found] == [len(one) for one in sequences]
    assert pack_forest(found).num_nodes == pack_forest(sequences).num_nodes
