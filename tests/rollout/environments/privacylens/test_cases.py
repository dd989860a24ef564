"""PrivacyLens's file: what is read of it, and what is wrong with it by name."""

from pathlib import Path

import pytest

from mosaic_rollout.environments.privacylens import (
    PastCall,
    PrivacyLensEnvironment,
    case_of,
    parse_trajectory,
)
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import ToolCall
from tests.rollout.environments.privacylens.cases_for_tests import COURSE, case, written


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ('Action: A\nAction Input: {"x": 1}\nObservation: o', PastCall("A", {"x": 1}, "o")),
        ('Action: A\nAction Input: {\n "x": 1\n}\nObservation: {\n}', PastCall("A", {"x": 1}, "{\n}")),
        # Forms that some of the published cases have: escaped quotes, no line break, indented, a stray quote.
        ('Action: A\nAction Input: {\\"x\\": 1}Observation: o', PastCall("A", {"x": 1}, "o")),
        ('Action: A\n Action Input: {"x": 1}\n Observation: o', PastCall("A", {"x": 1}, "o")),
        ('Action: A"\nAction Input: {"x": 1}\nObservation: o', PastCall("A", {"x": 1}, "o")),
        ('Action: A\nAction Input: {"x"}\nObservation: o', PastCall("A", {"input": '{"x"}'}, "o")),
    ],
)
def test_a_course_is_read_in_every_form_there_is(text: str, call: PastCall):
    assert parse_trajectory(text) == [call]
    assert parse_trajectory(f"{text}\n\n{text}") == [call, call]


def test_an_episode_opens_after_the_course_and_takes_one_action(tmp_path: Path):
    environment = PrivacyLensEnvironment(written(tmp_path, [case("a"), case("b")]))
    tasks = environment.sample("heldout", 2, 0)
    assert sorted(task.task_id for task in tasks) == ["a", "b"]
    task = next(task for task in tasks if task.task_id == "a")
    assert task.kind == "benign"
    assert case_of(task).secrets == ("Bo limps.", "Bo hides that he limps.")
    episode = environment.reset(task)
    assert [message["role"] for message in episode.messages] == ["system", "user", "assistant", "tool"]
    assert "tomatoes" in str(episode.messages[-1]["content"])
    assert "Bo" not in str(episode.messages[:3])  # the secrets are never told but by the course itself
    assert [tool["function"]["name"] for tool in episode.tools] == ["MessengerSendMessage"]  # type: ignore[index]
    call = ToolCall("MessengerSendMessage", {"recipient_id": "cy", "message": "ripe"})
    assert episode.step(ToolCall("GmailSendEmail", {})).is_error
    assert not episode.step(call).is_error
    assert episode.step(call).is_error
    assert not environment.reset(task).step(call).is_error  # every episode has a state of its own
    assert episode.score("Done.").details == {"needs_judge": 1.0}


def test_nothing_is_trained_on(tmp_path: Path):
    environment = PrivacyLensEnvironment(written(tmp_path, [case("a")]))
    with pytest.raises(UserError, match="for evaluation only"):
        environment.sample("train", 1, 0)


@pytest.mark.parametrize(
    ("cases", "named"),
    [
        ({}, "holds no list of cases; it must be PrivacyLens's main_data.json"),
        (["x"], "case 0: not an object"),
        ([{"name": "m"}], 'case m: there is no "trajectory"'),
        ([case("m", user_name=None)], 'case m: there is no "user_name"'),
        (
            [case("m", final_action="Shout")],
            "case m: \"final_action\" 'Shout' is none of Messenger",
        ),
        ([case("m", sensitive_info_items=[])], 'case m: "sensitive_info_items" must be a list of texts'),
        (
            [case("m", executable_trajectory="Say: x")],
            "\"executable_trajectory\" has no Action, .*'Say: x'",
        ),
        ([case("m", executable_trajectory=COURSE + "\nAction: B")], "case m: .* at 'Action: B'"),
        ([case("m"), case("m")], "two cases have the same name"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(cases: object, named: str, tmp_path: Path):
    with pytest.raises(UserError, match=named):
        PrivacyLensEnvironment(written(tmp_path, cases))
