"""The parts of the AgentDojo adapter that need no installed benchmark."""

import sys

import pytest

from mosaic_rollout.environments.agentdojo import AgentDojoEnvironment, tasks
from mosaic_rollout.environments.agentdojo.api import REPLACED, stand_ins
from mosaic_rollout.environments.agentdojo.world import without_titles
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task

POOLS: tasks.Pools = {
    "train": {"a": (["u0", "u1", "u2"], ["i0", "i1"]), "b": (["u0"], ["i0"])},
    "heldout": {"a": (["u3"], ["i2"]), "b": (["u1"], ["i1"])},
}


def test_stand_ins_leave_nothing_behind() -> None:
    hooks, modules = list(sys.meta_path), set(sys.modules)
    with stand_ins():
        finder = sys.meta_path[0]
        spec = finder.find_spec(f"{REPLACED[1]}.openai_llm", None)
        assert spec is not None
        assert finder.find_spec("agentdojo.attacks", None) is None
        assert finder.find_spec("openai", None) is None
    assert sys.meta_path == hooks
    assert set(sys.modules) == modules


def test_titles_go_but_an_argument_named_title_stays() -> None:
    schema = {
        "title": "Input schema",
        "properties": {"title": {"title": "Title", "anyOf": [{"type": "string", "title": "T"}]}},
        "required": ["title"],
    }
    assert without_titles(schema) == {
        "properties": {"title": {"anyOf": [{"type": "string"}]}},
        "required": ["title"],
    }


@pytest.mark.parametrize("count", [2, 3, 16, 40])
@pytest.mark.parametrize("heldout_frac", [0.01, 0.25, 0.99])
def test_split_divides_without_overlap_and_leaves_no_side_empty(count: int, heldout_frac: float) -> None:
    ids = [f"user_task_{i}" for i in range(count)]
    split = tasks.split_ids("suite", ids, heldout_frac)
    assert split["train"]
    assert split["heldout"]
    assert sorted(split["train"] + split["heldout"]) == sorted(ids)
    assert tasks.split_ids("suite", ids[::-1], heldout_frac)["heldout"] == split["heldout"][::-1]


def test_draw_is_pure_and_spreads_kinds_and_suites() -> None:
    drawn = tasks.draw(POOLS, "train", 8, seed=3, injected_frac=0.5)
    assert drawn == tasks.draw(POOLS, "train", 8, seed=3, injected_frac=0.5)
    assert drawn[:4] == tasks.draw(POOLS, "train", 4, seed=3, injected_frac=0.5)
    assert any(drawn != tasks.draw(POOLS, "train", 8, seed=s, injected_frac=0.5) for s in (4, 5, 6))
    assert [task.kind for task in drawn] == ["benign", "injected"] * 4
    for kind in ("benign", "injected"):
        suites = [tasks.payload_of(task).suite for task in drawn if task.kind == kind]
        assert sorted(suites) == ["a", "a", "b", "b"]


def test_draw_repeats_only_once_a_pool_is_used_up() -> None:
    one_suite: tasks.Pools = {"train": {"a": POOLS["train"]["a"]}, "heldout": {}}
    drawn = tasks.draw(one_suite, "train", 8, seed=0, injected_frac=0.0)
    ids = [task.task_id for task in drawn]
    assert len(set(ids[:3])) == len(set(ids[3:6])) == 3
    assert tasks.draw(one_suite, "train", 0, seed=0, injected_frac=0.5) == []


def test_unknown_split_and_foreign_task_are_refused() -> None:
    with pytest.raises(UserError, match="train and heldout"):
        tasks.draw(POOLS, "test", 1, seed=0, injected_frac=0.5)
    with pytest.raises(TypeError, match="not a task of AgentDojo"):
        tasks.payload_of(Task("x", "benign", "train"))


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="heldout_frac"):
        AgentDojoEnvironment(heldout_frac=1.0)
    with pytest.raises(UserError, match="both name slack"):
        AgentDojoEnvironment(("slack",), heldout_suites=("slack",))
