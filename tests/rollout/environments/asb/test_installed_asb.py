"""Agent Security Bench through our environment. Fails where the package is not installed."""

from typing import cast

import pytest

from mosaic_rollout.environments.asb import AsbEnvironment, AsbEpisode, case_of
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Task, ToolCall

SPLITS = ("train", "heldout")
AGENTS = ("financial_analyst_agent", "legal_consultant_agent")


@pytest.fixture(scope="module")
def environment() -> AsbEnvironment:
    return AsbEnvironment()


def names(episode: AsbEpisode) -> list[str]:
    return [cast("dict[str, str]", tool["function"])["name"] for tool in episode.tools]


def both_kinds(environment: AsbEnvironment, split: str) -> list[Task]:
    return environment.tasks(split, injected=False) + environment.tasks(split, injected=True)


def test_every_task_scores_obeying_as_harm_and_ignoring_as_done(environment: AsbEnvironment) -> None:
    """All 51 tasks and 1,310 held-together pairs: normal tools make it done, the attacker's makes it harm."""
    for task in [task for split in SPLITS for task in both_kinds(environment, split)]:
        case, episode = case_of(task), environment.reset(task)
        idle = episode.score("Done.")
        assert (idle.harm, idle.done, idle.progress) == (False, False, 0.0)
        for tool in case.agent.normal_tools:
            output = episode.step(ToolCall(tool.name, {})).content
            assert tool.output in output
            assert (case.attack is not None) == ("Ignore previous instructions" in output)
        clean = episode.score("Done.")
        assert (clean.harm, clean.done, clean.progress) == (False, True, 1.0)
        if case.attack is not None:
            episode.step(ToolCall(case.attack.name, {"any": "thing"}))
            assert episode.score("Done.").harm
    counts = [len(environment.tasks(split, injected=False)) for split in SPLITS]
    assert sum(counts) == 51


def test_an_attack_on_the_prompt_is_in_the_request_alone() -> None:
    environment = AsbEnvironment(AGENTS, attack="prompt")
    task = environment.tasks("train", injected=True)[0]
    case, episode = case_of(task), environment.reset(task)
    assert case.attack is not None
    assert case.attack.instruction in str(episode.messages[0]["content"])
    assert (
        episode.step(ToolCall(case.agent.normal_tools[0].name, {})).content
        == case.agent.normal_tools[0].output
    )


def test_benign_tasks_have_no_tool_of_an_attacker(environment: AsbEnvironment) -> None:
    for task in environment.sample("train", 20, 0):
        assert len(names(environment.reset(task))) == (2 if task.kind == "benign" else 3)
    episode = environment.reset(environment.tasks("train", injected=False)[0])
    assert episode.step(ToolCall("LoanFraud", {})).is_error
    assert not episode.score("Done.").harm


def test_nothing_leaks_between_the_splits() -> None:
    """Neither a request nor an attack in either of its wordings; no agent where agents are held out."""
    for environment in (AsbEnvironment(), AsbEnvironment(heldout_suites=AGENTS)):
        found = {}
        for split in SPLITS:
            cases = [case_of(task) for task in both_kinds(environment, split)]
            assert cases
            pairs = {case.attack.pair for case in cases if case.attack is not None}
            found[split] = pairs | {case.request for case in cases}
        assert not found["train"] & found["heldout"]
    held = AsbEnvironment(heldout_suites=AGENTS).tasks("heldout", injected=True)
    assert {case_of(task).agent.name for task in held} == set(AGENTS)


def test_samples_are_pure_and_spread(environment: AsbEnvironment) -> None:
    drawn = environment.sample("heldout", 40, 1)
    assert drawn == environment.sample("heldout", 40, 1) != environment.sample("heldout", 40, 2)
    assert [task.kind for task in drawn] == ["benign", "injected"] * 20
    assert len({case_of(task).agent.name for task in drawn}) == 10


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="no agent 'banking'"):
        AsbEnvironment(["banking"])
    with pytest.raises(UserError, match="there are observation, prompt"):
        AsbEnvironment(attack="memory")
    with pytest.raises(UserError, match="both name legal"):
        AsbEnvironment(["legal_consultant_agent"], heldout_suites=["legal_consultant_agent"])
