"""A rollout of several contexts is one rollout to every loss: its gradient is that of its sequences alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mosaic_fast.config import OWN_SETTINGS
from mosaic_fast.learner.step_batch import StepBatch, step_batch
from mosaic_kernels import pack_forest
from mosaic_kernels.preference.reference import needed_nodes
from tests.learner import test_learner_exactness as exactness
from tests.learner.flat_oracle import VOCAB, Case, alone
from tests.learner.learner_configs import config_of
from tests.learner.rollouts_for_tests import make_rollout
from tests.policy.policy_helpers import assert_gradients_close, tiny_model


@dataclass(frozen=True)
class Contexts(Case):
    """`starts`: where each rollout's tokens begin anew."""

    starts: tuple[tuple[int, ...], ...] = ()

    def batch(self) -> StepBatch:
        parts = [
            [part for whole, at in zip(all_of, self.starts, strict=True) for part in np.split(whole, at)]
            for all_of in (self.sequences, self.trained)
        ]
        return replace(super().batch(), forest=pack_forest(*parts))


def several_contexts() -> Contexts:
    """Two that compact (the second also asks the same twice), one with a branch, one of one context."""
    rng = np.random.default_rng(3)
    system, first = rng.integers(0, VOCAB, 4), rng.integers(0, VOCAB, 6)
    main, after = np.concatenate([system, first]), np.concatenate([system, rng.integers(0, VOCAB, 5)])
    branch = np.concatenate([main[:7], rng.integers(0, VOCAB, 3)])
    rollouts = [[main, after], [main, after[:8], main], [main, branch], [rng.integers(0, VOCAB, 6)]]
    masks = [[np.arange(len(part)) >= 4 for part in parts] for parts in rollouts]
    masks[2][1][:7] = False  # what is above the branch is trained in the first context alone
    starts = tuple(tuple(np.cumsum([len(part) for part in parts])[:-1].tolist()) for parts in rollouts)
    upper = np.triu(np.array([[0.5, 1.0, 0.0, 0.7]] * 4), 1)
    return Contexts(
        sequences=[np.concatenate(parts) for parts in rollouts],
        trained=[np.concatenate(parts) for parts in masks],
        parents=[-1] * 4,
        fork_positions=[0] * 4,
        groups=[[0, 1, 2, 3]],
        preferences=[upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(4)],
        advantages=np.array([1.2, -0.7, 0.4, -0.9]),
        returns=np.array([3.0, 1.0, 2.0, 0.5]),
        rollout_logprobs=[np.zeros(sum(map(len, parts)), np.float32) for parts in rollouts],
        starts=starts,
    )


def each_alone(model: PreTrainedModel, case: Case, temperature: float) -> tuple[list[Tensor], list[Tensor]]:
    """As `alone`, each context by itself; one list entry a rollout."""
    assert isinstance(case, Contexts)
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for sequence, at in zip(case.sequences, case.starts, strict=True):
        parts = alone(model, replace(case, sequences=np.split(sequence, at)), temperature)
        for values, whole in zip(parts, found, strict=True):
            whole.append(torch.cat(values))
    return found


@pytest.mark.parametrize("name", OWN_SETTINGS)
def test_the_gradient_is_that_of_the_contexts_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    """Every loss and its normalisation, whole and cut; coupled ones see a rollout's contexts as one."""
    monkeypatch.setattr(exactness, "alone", each_alone)
    case = several_contexts()
    for plan, penalised in (("tree", True), ("cut", False)):
        model, config = tiny_model("qwen3"), config_of(name, penalised=penalised)
        got, _ = exactness.last_epoch(model, config, case, plan)
        assert_gradients_close(got, exactness.flat_gradients("qwen3", model, config, case), 1e-10)


def test_a_step_packs_each_context_by_itself():
    case = several_contexts()
    group = [
        replace(make_rollout(token_ids=ids, trained=mask, rollout_id=number), contexts=at)
        for number, (ids, mask, at) in enumerate(zip(case.sequences, case.trained, case.starts, strict=True))
    ]
    batch = step_batch([group], case.preferences, [case.returns], [case.advantages])
    assert batch.forest.num_rollouts == 8
    assert batch.by_rollout.cu_seqlens.tolist() == np.cumsum([0, *map(len, case.sequences)]).tolist()
    assert (batch.forest.node_index == case.batch().forest.node_index).all()


def test_an_edge_that_one_rollout_has_twice_does_not_cancel():
    forest = pack_forest([[1, 2], [1, 2], [1, 2]])
    pairs = np.array([[0, 1]])
    assert not needed_nodes(pack_forest([[1, 2], [1, 2]]), pairs).any()
    assert needed_nodes(replace(forest, cu_seqlens=np.array([0, 4, 6])), pairs).tolist() == [False, True]
