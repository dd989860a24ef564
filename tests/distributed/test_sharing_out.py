"""Rollouts shared out over ranks: the cut against every other one, costs against counted work."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_fast.learner.execution import CostModel
from mosaic_fast.learner.execution.cost import node_seconds, share_of, shares, work_of
from mosaic_fast.learner.execution.schedule import Forward
from mosaic_kernels import PackedForest
from tests.policy.policy_helpers import CONFIGS, Rollouts, rollouts


def cost_of(forest: PackedForest, cost: np.ndarray, chosen: list[int]) -> float:
    """Of the distinct nodes of some rollouts."""
    bounds = forest.cu_seqlens
    nodes = {int(n) for r in chosen for n in forest.node_index[bounds[r] : bounds[r + 1]]}
    return float(sum(cost[node] for node in nodes))


@settings(max_examples=60)
@given(data=rollouts(), ranks=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_dearest_share_is_as_cheap_as_of_any_cut(data: Rollouts, ranks: int, seed: int):
    forest = data.pack()
    cost = np.random.default_rng(seed).integers(0, 9, forest.num_nodes).astype(np.float64)
    found = [share.tolist() for share in shares(forest, cost, ranks)]
    filled = np.flatnonzero(np.diff(forest.cu_seqlens)).tolist()
    assert len(found) == ranks
    assert sorted(rollout for share in found for rollout in share) == filled  # each rollout on one rank
    order = sorted(filled, key=lambda rollout: forest.node_index[forest.cu_seqlens[rollout + 1] - 1])
    cuts = combinations_with_replacement(range(len(order) + 1), ranks - 1)
    best = min(
        max(cost_of(forest, cost, order[a:b]) for a, b in pairwise((0, *cut, len(order)))) for cut in cuts
    )
    assert max(cost_of(forest, cost, share) for share in found) == pytest.approx(best)


@settings(max_examples=30)
@given(data=rollouts(), ranks=st.integers(1, 3))
def test_a_share_has_its_rollouts_tokens(data: Rollouts, ranks: int):
    forest = data.pack()
    tokens = forest.tokens[forest.node_index]
    seen = []
    for chosen in shares(forest, np.ones(forest.num_nodes), ranks):
        part = share_of(forest, chosen)
        assert part.source is not None
        np.testing.assert_array_equal(part.tokens[part.node_index], tokens[part.source])
        np.testing.assert_array_equal(part.trained, forest.trained[part.source])
        seen += part.source.tolist()
    assert sorted(seen) == list(range(forest.num_tokens))


@pytest.mark.parametrize("case", ["qwen3-window", "llama"])
@settings(max_examples=30)
@given(data=rollouts())
def test_the_nodes_cost_what_the_forest_does(case: str, data: Rollouts):
    """All but the start of layers, which is a forward's and no node's."""
    forest, config = data.pack(), CONFIGS[case]
    cost = CostModel(linear=3.0, attention=5.0, head=7.0, layer_calls=0.0, kept=11.0)
    expected = cost.predict(work_of([Forward(forest)], config))
    assert node_seconds(forest, config, cost).sum() == pytest.approx(expected, rel=1e-12)
