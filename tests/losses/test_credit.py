"""Credit against its definition: who sampled a token, who holds it, and what each mode makes of that."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_fast.learner.step_batch import prune
from mosaic_fast.losses.credit import assign_credit, find_forks, forks_of
from mosaic_kernels import pack_forest
from tests.learner.flat_oracle import Case, credit_of
from tests.learner.rollouts_for_tests import make_rollout


def case_of(lengths: list[int], parents: list[int], positions: list[int], returns: list[float]) -> Case:
    """Only what credit reads; every token counts."""
    return Case(
        sequences=[np.zeros(n, np.int64) for n in lengths],
        trained=[np.ones(n, np.bool_) for n in lengths],
        parents=parents,
        fork_positions=positions,
        groups=[list(range(len(lengths)))],
        preferences=[],
        advantages=np.array(returns) - np.mean(returns),
        returns=np.array(returns),
        rollout_logprobs=[],
    )


@st.composite
def families(draw: st.DrawFn) -> Case:
    """1 to 7 rollouts, each apart or forked anywhere from any earlier one, forks of forks included."""
    count = draw(st.integers(1, 7))
    lengths, parents, positions = [], [], []
    for r in range(count):
        parent = draw(st.integers(-1, r - 1))
        position = draw(st.integers(0, lengths[parent])) if parent >= 0 else 0
        parents.append(parent)
        positions.append(position)
        lengths.append(position + draw(st.integers(0, 4)))
    returns = draw(st.lists(st.integers(-4, 4), min_size=count, max_size=count))
    return case_of(lengths, parents, positions, [float(r) for r in returns])


@given(families(), st.sampled_from(["sum", "mean", "first", "subtree"]))
def test_every_mode_is_its_definition(case, mode):
    lengths = [len(s) for s in case.sequences]
    forks = find_forks(lengths, case.parents, case.fork_positions)
    credit = assign_credit(mode, forks, case.advantages, case.returns)
    expected = [credit_of(case, mode, r, t) for r, n in enumerate(lengths) for t in range(n)]
    assert len(credit.weights) == sum(lengths)
    for index, (weight, advantage) in enumerate(expected):
        assert credit.weights[index] == pytest.approx(weight), index
        if weight:  # the advantage of a copy that does not count means nothing
            assert credit.advantages[index] == pytest.approx(advantage), index


def test_the_subtree_example():
    """A trunk (return 3) with a fork at 2 (return 1): 0 above, half the difference to either side."""
    forks = find_forks([4, 4], [-1, 0], [0, 2])
    assert forks.sampled_at.tolist() == [0, 1, 2, 3, 0, 1, 6, 7]
    credit = assign_credit("subtree", forks, np.zeros(2), np.array([3.0, 1.0]))
    assert credit.weights.tolist() == [1, 1, 1, 1, 0, 0, 1, 1]
    assert credit.advantages.tolist() == [0, 0, 1, 1, 0, 0, -1, -1]


def test_coincidental_sharing_gets_no_credit():
    """Two rollouts that agree in every token, neither forked from the other."""
    forks = find_forks([3, 3], [-1, -1], [0, 0])
    for mode in ("mean", "first"):
        assert assign_credit(mode, forks, np.ones(2), np.ones(2)).weights.tolist() == [1] * 6


def test_rollouts_name_their_forks_by_id():
    """Ids need not be indices."""
    trunk = make_rollout(rollout_id=40)
    child = make_rollout(rollout_id=12, parent_id=40, fork_position=3)
    assert forks_of([child, trunk]).sampled_at.tolist() == [5, 6, 7, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("parents", "positions", "named"),
    [
        ([-1, 5], [0, 1], "parent 5, outside"),
        ([-1, 0], [0, 4], "at token 4, beyond an end"),
        ([1, 0], [1, 1], "descends from itself"),
    ],
)
def test_impossible_forks_are_named(parents, positions, named):
    with pytest.raises(ValueError, match=named):
        find_forks([3, 3], parents, positions)


@given(st.data())
def test_the_narrowed_forest_holds_the_needed_tokens_and_their_context_alone(data):
    count = data.draw(st.integers(0, 5))
    sequences = [data.draw(st.lists(st.integers(0, 2), max_size=6)) for _ in range(count)]
    trained = [np.arange(len(s)) > 0 for s in sequences]
    forest = pack_forest(sequences, trained)
    size = forest.num_tokens
    needed = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), np.bool_)
    reach = prune(forest, needed)
    tokens, kept = forest.tokens[forest.node_index], forest.tokens[forest.node_index][reach.source]
    assert reach.forest.num_rollouts == count
    assert (reach.forest.tokens[reach.forest.node_index] == kept).all()
    assert len(tokens) >= len(kept)
    wanted = np.flatnonzero(needed & forest.trained)
    assert reach.source[reach.forest.trained].tolist() == wanted.tolist()
    # no node is kept but the needed ones and their ancestors
    alive = set()
    for node in forest.node_index[wanted].tolist():
        while node >= 0:
            alive.add(node)
            node = int(forest.parent[node])
    assert reach.forest.num_nodes == len(alive)
    assert reach.pruned_frac == pytest.approx(1 - len(alive) / forest.num_nodes if forest.num_nodes else 0)


def test_a_forest_that_is_all_in_reach_stays_the_same_object():
    forest = pack_forest([[1, 2, 3], [1, 2, 4]])
    assert prune(forest, forest.trained).forest is forest
