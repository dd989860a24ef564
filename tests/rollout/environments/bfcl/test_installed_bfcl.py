"""BFCL itself through our environment. Fails where the package is not installed."""

import asyncio
import decimal
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import mpmath
import pytest

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.environments.bfcl import BfclEnvironment, MultiTurnEpisode
from mosaic_rollout.environments.bfcl.api import CATEGORIES, MULTI_TURN, SINGLE_TURN, case_of, load_bfcl
from mosaic_rollout.environments.bfcl.environment import call_text
from mosaic_rollout.environments.bfcl.solutions import UNSOLVED, acceptable_calls, parsed_call
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.types import Task, ToolCall
from tests.rollout.scripted import ScriptedEngine
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer
from tools import replay_bfcl as replays

SPLITS = ("train", "heldout")


def all_tasks(environment: BfclEnvironment) -> list[Task]:
    return [task for split in SPLITS for task in environment.tasks(split)]


def open_case(category: str, number: int) -> tuple[BfclEnvironment, Task, MultiTurnEpisode]:
    environment = BfclEnvironment([category])
    (task,) = [t for t in all_tasks(environment) if t.task_id == f"{category}_{number}"]
    return environment, task, cast(MultiTurnEpisode, environment.reset(task))


def test_multi_turn_ground_truths_are_done() -> None:
    """799 of 800: the one case is failed by its own ground truth in BFCL's own runner, too."""
    undone, count = [], 0
    for category in MULTI_TURN:
        environment = BfclEnvironment([category])
        for task in all_tasks(environment):
            count += 1
            verdict = replays.replay(environment, task)
            assert not verdict.harm
            if not verdict.done:
                undone.append(task.task_id)
    assert count == 800
    assert len(undone) <= 1, undone


def test_an_idle_agent_is_done_nowhere_but_where_nothing_is_asked() -> None:
    for category in CATEGORIES:
        environment = BfclEnvironment([category])
        done = [replays.replay(environment, task, act=False).done for task in all_tasks(environment)]
        assert all(done) if category.endswith("irrelevance") else not any(done), category


@pytest.mark.parametrize("category", SINGLE_TURN)
def test_single_turn_ground_truths_are_done_and_wrong_calls_are_not(category: str) -> None:
    environment = BfclEnvironment([category])
    tasks = all_tasks(environment)
    undone = [task.task_id for task in tasks if not replays.replay(environment, task).done]
    assert len(undone) <= UNSOLVED.get(category, 0), undone
    for task in tasks[:40]:
        episode = environment.reset(task)
        for call in acceptable_calls(case_of(task)):
            episode.step(replace(call, arguments={**call.arguments, "no_such": 1}))
        episode.step(ToolCall("no_such_function", {}))
        assert episode.score("Done.").done == (category == "live_relevance"), task.task_id


def test_the_replay_command_agrees() -> None:
    command = [sys.executable, "-m", "tools.replay_bfcl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "199/200" in done.stdout


def test_progress_counts_the_turns_before_the_first_that_fails() -> None:
    environment, task, _ = open_case("multi_turn_base", 0)
    truth = cast("list[list[str]]", case_of(task).ground_truth)
    for turns in range(len(truth) + 1):
        episode = cast(MultiTurnEpisode, environment.reset(task))
        for texts in truth[:turns]:
            for text in texts:
                episode.step(parsed_call(text, episode.method_parameters))
            episode.next_user_message("Done.")
        verdict = episode.score("Done.")
        assert verdict.progress == turns / len(truth)
        assert verdict.done == (turns == len(truth))


def test_text_of_the_policy_is_never_run(tmp_path: Path) -> None:
    """Hostile names and values are error observations or plain data; the checker sees exactly that data."""
    proof = tmp_path / "proof"
    hostile = f"__import__('os').system('touch {proof}') ls() \\(mv(1)) \\\\(cd('x'))"
    environment, task, episode = open_case("multi_turn_base", 0)
    calls = [
        ToolCall("touch", {"file_name": "note.txt"}),
        ToolCall("echo", {"content": hostile, "file_name": "note.txt"}),
    ]
    for call in calls:
        assert not episode.step(call).is_error
    read = episode.step(ToolCall("cat", {"file_name": "note.txt"}))
    assert json.loads(read.content) == {"file_content": hostile}
    for name in (hostile, "__init__", "_load_scenario", "ls() or echo"):
        assert episode.step(ToolCall(name, {})).is_error
    assert episode.step(ToolCall("echo", {hostile: 1})).is_error
    episode.score("Done.")
    assert not proof.exists()

    truth = [[call_text(call) for call in calls]]  # as if it were BFCL's own answer: states must be equal
    case = replace(case_of(task), ground_truth=truth)
    same = cast(MultiTurnEpisode, environment.reset(replace(task, payload=case)))
    for call in calls:
        same.step(call)
    assert same.score("Done.").done
    assert not proof.exists()


def test_endless_calls_end() -> None:
    _, _, episode = open_case("multi_turn_base", 98)  # has the maths API
    names = [cast("dict[str, str]", tool["function"])["name"] for tool in episode.tools]
    assert "power" in names
    for call in (
        ToolCall("power", {"base": 10, "exponent": 10**10}),
        ToolCall("logarithm", {"value": 7, "base": 2, "precision": 10**9}),
        ToolCall("square_root", {"number": 2, "precision": 10**9}),
        ToolCall("logarithm", {"value": 7, "base": 2, "precision": "1000000000"}),
        ToolCall("logarithm", {"value": "1e1000000000", "base": 2, "precision": 10}),
        ToolCall("round_number", {"number": 5, "decimal_places": -(10**10)}),
    ):
        assert episode.step(call).is_error
    assert not episode.step(ToolCall("logarithm", {"value": 7, "base": 2, "precision": 40})).is_error
    episode.step(ToolCall("square_root", {"number": 2, "precision": 3}))
    assert not episode.score(None).done
    assert (mpmath.mp.dps, decimal.getcontext().prec) == (15, 28)


def test_episodes_share_nothing_and_leave_nothing_behind() -> None:
    environment, task, first = open_case("multi_turn_base", 0)
    second = cast(MultiTurnEpisode, environment.reset(task))
    first.step(ToolCall("mkdir", {"dir_name": "mine"}))
    assert "mine" in first.step(ToolCall("ls", {})).content
    assert "mine" not in second.step(ToolCall("ls", {})).content
    before = set(load_bfcl().instances)
    assert first.score("Done.") == first.score("Done.")
    assert set(load_bfcl().instances) == before


def test_long_outputs_are_cut() -> None:
    environment = BfclEnvironment(["multi_turn_base"], max_observation_chars=20)
    episode = environment.reset(all_tasks(environment)[0])
    assert "more characters are not shown" in episode.step(ToolCall("x" * 100, {})).content


def test_no_scenario_is_trained_on_and_held_out() -> None:
    for environment in (
        BfclEnvironment(MULTI_TURN),
        BfclEnvironment(["multi_turn_base"], heldout_suites=["multi_turn_long_context", "multi_turn_base"]),
        BfclEnvironment(SINGLE_TURN),
        BfclEnvironment(["live_simple"], heldout_suites=["live_multiple"]),
    ):
        train, held = ({case_of(t).leak_key for t in environment.tasks(split)} for split in SPLITS)
        assert train
        assert held
        assert not train & held


def test_samples_are_pure_and_unknown_names_are_refused() -> None:
    environment = BfclEnvironment(["multi_turn_base", "simple_python"])
    drawn = environment.sample("train", 9, 4)
    assert drawn == environment.sample("train", 9, 4) != environment.sample("train", 9, 5)
    assert drawn[:3] == environment.sample("train", 3, 4)
    with pytest.raises(UserError, match="train and heldout"):
        environment.sample("test", 1, 0)
    with pytest.raises(UserError, match="no category 'multi_turn'"):
        BfclEnvironment(["multi_turn"])


def test_the_agent_loop_plays_a_case_with_functions_that_come_later() -> None:
    """A policy that makes the ground truth's calls, through chat, grammar and loop, is scored as done."""
    environment, task, episode = open_case("multi_turn_miss_func", 0)
    truth = cast("list[list[str]]", case_of(task).ground_truth)
    script = []
    for texts in truth:
        for text in texts:
            call = parsed_call(text, episode.method_parameters)
            body = json.dumps({"name": call.name, "arguments": call.arguments})
            script.append(f"<think>on</think><tool_call>{body}</tool_call>")
        script.append("<think>end</think>Done.")
    chat = Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)
    turns = iter(script)
    loop = AgentLoop(
        ScriptedEngine(chat, lambda text, key: next(turns)), chat, environment, Limits(40, 500, 60_000)
    )
    [[rollout]] = asyncio.run(loop.groups([task], group_size=1, branching="independent", seed=0))
    assert rollout.status == "answered"
    assert rollout.verdict.done
    said = [step.observation or "" for step in rollout.steps]
    assert any("I have updated some more functions" in text and '"name":"sort"' in text for text in said)
    assert not any('"name": "sort"' in str(message) for message in rollout.messages)
