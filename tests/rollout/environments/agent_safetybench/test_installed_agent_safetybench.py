"""Agent-SafetyBench's environments with cases of its format. Fails where the package is not installed."""

import json
from pathlib import Path

import pytest

from mosaic_rollout.environments.agent_safetybench import AgentSafetyBenchEnvironment, has_world, make_world
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, ToolCall

ATTEMPT: JsonValue = {"attempt_id": "a1", "user": "eve"}
ACCESS: JsonValue = {
    "name": "AccessControl_1",
    "tools": ["list_access_attempts", "flag_unauthorized_access"],
    "parameters": {"access_attempts": [ATTEMPT]},
}


def case(number: int, **changes: JsonValue) -> dict[str, JsonValue]:
    """A case in the form of released_data.json."""
    return {
        "id": number,
        "risks": ["Leak sensitive data / information"],
        "instruction": f"Look into attempt {number}.",
        "environments": [ACCESS],
        "failure_modes": ["1"],
        "fulfillable": number % 2,
        **changes,
    }


def written(folder: Path, cases: object) -> Path:
    path = folder / "released_data.json"
    path.write_text(json.dumps(cases))
    return path


def test_a_case_opens_its_environment_and_runs_its_tools(tmp_path: Path) -> None:
    environment = AgentSafetyBenchEnvironment(written(tmp_path, [case(i) for i in range(10)]))
    tasks = environment.sample("train", 8, 0) + environment.sample("heldout", 2, 0)
    assert sorted(int(task.task_id) for task in tasks) == list(range(10))
    for task in tasks:
        assert task.kind == ("benign" if int(task.task_id) % 2 else "harmful")
        episode = environment.reset(task)
        assert episode.messages[0]["content"] == f"Look into attempt {task.task_id}."
        assert [tool["function"]["name"] for tool in episode.tools] == ACCESS["tools"]  # type: ignore[index]
        found = json.loads(episode.step(ToolCall("list_access_attempts", {})).content)
        assert found["data"]["access_attempts"] == [ATTEMPT]
        verdict = episode.score("Done.")
        assert (verdict.harm, verdict.done, verdict.details) == (False, False, {"needs_judge": 1.0})


def test_episodes_share_no_state_with_the_case_or_with_each_other(tmp_path: Path) -> None:
    """Arguments are edited by the environments, parameters become their state."""
    environment = AgentSafetyBenchEnvironment(written(tmp_path, [case(i) for i in range(2)]))
    [task] = environment.sample("train", 1, 0)
    first, second = environment.reset(task), environment.reset(task)
    call = ToolCall("flag_unauthorized_access", {"attempt_id": "a1", "no_such": 1})
    first.step(call)
    assert call.arguments == {"attempt_id": "a1", "no_such": 1}
    assert (
        vars(first._worlds["list_access_attempts"])["access_attempts"]
        is not (vars(second._worlds["list_access_attempts"])["access_attempts"])
    )


def test_a_tool_that_raises_or_is_unknown_is_an_error_observation(tmp_path: Path) -> None:
    environment = AgentSafetyBenchEnvironment(
        written(tmp_path, [case(i) for i in range(2)]), max_observation_chars=30
    )
    episode = environment.reset(environment.sample("train", 1, 0)[0])
    assert episode.step(ToolCall("list_vulnerabilities", {})).is_error  # the environment's, not the case's
    assert episode.step(ToolCall("__init__", {})).is_error
    assert "more characters" in episode.step(ToolCall("list_access_attempts", {})).content


def test_no_tool_writes_a_file(tmp_path: Path) -> None:
    people: JsonValue = [{"id": "p", "public_records": {"r": "secret"}}]
    spokeo: JsonValue = {
        "name": "Spokeo",
        "tools": ["download_public_record"],
        "parameters": {"people_data": people},
    }
    environment = AgentSafetyBenchEnvironment(
        written(tmp_path, [case(i, environments=[spokeo]) for i in range(2)])
    )
    episode = environment.reset(environment.sample("train", 1, 0)[0])
    target = tmp_path / "loot"
    arguments: dict[str, JsonValue] = {"unique_id": "p", "record_id": "r", "local_file_path": str(target)}
    episode.step(ToolCall("download_public_record", arguments))
    assert not target.exists()


def test_a_dialogue_opens_the_conversation(tmp_path: Path) -> None:
    dialogue: JsonValue = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Flag it"},
    ]
    environment = AgentSafetyBenchEnvironment(written(tmp_path, [case(0), case(1, dialog=dialogue)]))
    tasks = environment.sample("train", 1, 0) + environment.sample("heldout", 1, 0)
    assert [list(environment.reset(t).messages) for t in tasks if t.task_id == "1"] == [dialogue]


def test_cases_of_one_request_are_not_divided(tmp_path: Path) -> None:
    cases = [case(i, instruction=f"Request {i // 3}.") for i in range(12)]
    environment = AgentSafetyBenchEnvironment(written(tmp_path, cases), heldout_frac=0.5)
    train, held = (
        {environment.reset(t).messages[0]["content"] for t in environment.sample(split, 6, 0)}
        for split in ("train", "heldout")
    )
    assert len(train) == len(held) == 2
    assert not train & held


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ({}, "no list of cases"),
        ([], "no list of cases"),
        ([1], "case 0: not an object"),
        ([case(4, fulfillable=None)], 'case 4: "fulfillable" must be 0 or 1'),
        ([case(4, environments={})], '"environments" must be a list'),
        ([case(4, environments=[{"name": "Nowhere", "tools": []}])], "no environment 'Nowhere'"),
        ([case(4, environments=[{"name": "../os", "tools": []}])], "no environment '../os'"),
        ([case(4, environments=[{"name": "AccessControl_1", "tools": "x"}])], "must be a list of names"),
        ([case(4, instruction="")], 'there is no "instruction"'),
        ([case(4, dialog=[{"role": "user"}])], '"dialog" must be messages'),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_case(tmp_path: Path, cases: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        AgentSafetyBenchEnvironment(written(tmp_path, cases))


def test_a_tool_the_environment_lacks_is_the_users_mistake(tmp_path: Path) -> None:
    wrong: JsonValue = {"name": "AccessControl_1", "tools": ["no_such"], "parameters": None}
    environment = AgentSafetyBenchEnvironment(
        written(tmp_path, [case(i, environments=[wrong]) for i in range(2)])
    )
    with pytest.raises(UserError, match="AccessControl_1 does not take"):
        environment.reset(environment.sample("train", 1, 0)[0])


def test_environments_open_without_parameters() -> None:
    for name in ("AccessControl", "Spokeo", "Webshop", "RiskyCue", "SafeCue"):
        assert has_world(name)
        make_world(name, None)
