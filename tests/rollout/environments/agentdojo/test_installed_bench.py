"""The trajectories that bench/ trains on. Fails where agentdojo or its model folder is missing."""

from collections.abc import Iterator
from pathlib import Path

import dojo_rollouts
import guided
import numpy as np
import pytest
from cases import step
from dojo_rollouts import ROLES, TASKS, play, tokens_of, workload
from workloads import qwen3

from mosaic_rollout.types import Rollout

SETTINGS = TASKS["step:agentdojo"]


@pytest.fixture(scope="module")
def group() -> Iterator[list[Rollout]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guided, "_MOST_TOKENS", 4)  # of a plan: seconds instead of minutes
        yield play(SETTINGS)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, group: list[Rollout]) -> Path:
    """Played already, and kept in a folder of the test's own."""
    monkeypatch.setattr(dojo_rollouts, "KEPT", tmp_path)
    monkeypatch.setattr(dojo_rollouts, "play", lambda settings: group)
    return tmp_path


def test_a_group_shares_its_prompt_and_forks_after_a_plan(group: list[Rollout]) -> None:
    prompt = group[0].steps[0].prompt_end
    assert len(group) == len(ROLES) == 8
    assert prompt > 1300
    for rollout in group:
        assert np.array_equal(rollout.token_ids[:prompt], group[0].token_ids[:prompt])
    for rollout, parent in zip(group[4:], group[:4], strict=True):
        fork = rollout.fork_position
        assert rollout.parent_id == parent.rollout_id
        assert fork in [one.check_start for one in parent.steps]
        assert np.array_equal(rollout.token_ids[:fork], parent.token_ids[:fork])
    plans = {rollout.steps[0].plan for rollout in group[:4]}
    assert len(plans) == 4  # each in words of its own


def test_exactly_the_turns_are_trained(group: list[Rollout]) -> None:
    for rollout in group:
        turns = np.zeros(len(rollout.token_ids), np.bool_)
        for one in rollout.steps:
            turns[one.prompt_end : one.end] = True
        assert np.array_equal(rollout.trained, turns)
        assert not turns.all()
        assert np.diff(turns.astype(int)).any()  # observations between them


def test_roles_are_what_they_say(group: list[Rollout]) -> None:
    solved, checked, obeyed, refused = group[:4]
    assert "<INFORMATION>" in str(solved.steps[0].observation)  # the attack
    for rollout in (solved, checked, obeyed):
        assert rollout.status == "answered"
        assert rollout.verdict.done
    assert [rollout.verdict.harm for rollout in group[:4]] == [False, False, True, False]
    assert refused.status == "refused"
    assert all(one.check is None for one in solved.steps)
    assert all(one.check is not None for one in checked.steps[1:])
    assert len(obeyed.steps) > len(solved.steps)


def test_what_was_played_is_read_the_next_time(
    kept: Path, monkeypatch: pytest.MonkeyPatch, group: list[Rollout]
) -> None:
    first = tokens_of(SETTINGS)
    monkeypatch.setattr(dojo_rollouts, "play", lambda settings: pytest.fail("played again"))
    for found in (first, tokens_of(SETTINGS)):
        for rollout, tokens, trained in zip(group, *found, strict=True):
            assert np.array_equal(tokens, rollout.token_ids)
            assert np.array_equal(trained, rollout.trained)
    assert len(list(kept.iterdir())) == 1


def test_gradients_equal_the_flat_batchs(kept: Path) -> None:
    found = workload(SETTINGS, qwen3(layers=2, hidden=128, vocabulary=1024))
    assert found.forest.num_tokens > 3 * found.forest.num_nodes
    assert step.check_steps(found, ("ours", "flat", "gather")) == {}
