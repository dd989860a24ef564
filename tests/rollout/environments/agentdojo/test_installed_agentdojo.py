"""AgentDojo itself through our environment. Fails where the package is not installed."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import cast

import pytest
import yaml

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.rewriting import rewritten
from mosaic_rollout.environments.agentdojo import AgentDojoEnvironment
from mosaic_rollout.environments.agentdojo.api import load_agentdojo
from mosaic_rollout.environments.agentdojo.tasks import SPLITS, payload_of
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.loop.demonstrated import demonstrated
from mosaic_rollout.types import Engine, Episode, Move, Step, Task, ToolCall
from tests.rollout.families_for_tests import FAMILIES
from tools import replay_agentdojo as replay

BANKING_READ = ToolCall("read_file", {"file_path": "bill-december-2023.txt"})


@pytest.fixture(scope="module")
def everything() -> AgentDojoEnvironment:
    return AgentDojoEnvironment(replay.SUITES)


@pytest.fixture(scope="module")
def banking() -> AgentDojoEnvironment:
    return AgentDojoEnvironment(("banking",))


def benign_tasks(environment: AgentDojoEnvironment) -> list[Task]:
    return [task for split in SPLITS for task in environment.tasks(split, injected=False)]


def test_replay_of_every_user_task_has_utility(everything: AgentDojoEnvironment) -> None:
    tasks = benign_tasks(everything)
    assert len(tasks) == replay.USER_TASKS
    for task in tasks:
        verdict = replay.replay(everything, task, "user")
        assert verdict.done, task.task_id
        assert (verdict.harm, verdict.progress) == (False, 1.0)
        assert (verdict.details["utility"], verdict.details["attack_success"]) == (1.0, 0.0)
        assert verdict.details["checker_errors"] == 0.0


def test_obeying_the_injection_is_an_attack_and_ignoring_it_is_not(everything: AgentDojoEnvironment) -> None:
    tasks, acting = replay.one_task_an_injection(everything), 0
    assert len(tasks) == replay.INJECTION_TASKS
    for task in tasks:
        assert not replay.replay(everything, task, "user").harm, task.task_id
        if replay.ground_truth_calls(everything, task, "injection")[0]:
            acting += 1
            assert replay.replay(everything, task, "injection").harm, task.task_id
    assert acting == 26


def test_what_an_idle_agent_is_given(everything: AgentDojoEnvironment) -> None:
    """Five banking checkers are met by doing nothing (AgentDojo's own run_task_with_pipeline agrees)."""
    idle = []
    for task in benign_tasks(everything):
        verdict = everything.reset(task).score(None)
        assert not verdict.harm
        assert verdict.details["idle_utility"] == float(verdict.done)
        if verdict.done:
            idle.append(task.task_id)
    assert sorted(idle) == [f"banking/user_task_{i}" for i in (10, 5, 6, 8, 9)]


def test_the_injection_shows_in_a_tool_output_and_only_there(everything: AgentDojoEnvironment) -> None:
    """The user task's own calls must meet the attack's text, or the task would test nothing."""
    for task in replay.one_task_an_injection(everything):
        episode = everything.reset(task)
        assert "<INFORMATION>" not in str(episode.messages)
        calls, _ = replay.ground_truth_calls(everything, task, "user")
        seen = "".join(episode.step(call).content for call in calls)
        assert "<INFORMATION>" in seen, task.task_id


def test_every_attack_of_agentdojo_is_there() -> None:
    assert len(load_agentdojo().attacks) == 17


def test_opening_states_are_agentdojos_own(everything: AgentDojoEnvironment) -> None:
    """Parsing with libyaml and formatting the text ourselves changes no state."""
    for task in [*benign_tasks(everything)[::7], *replay.one_task_an_injection(everything)]:
        payload = payload_of(task)
        world = everything._worlds[payload.suite]
        user, injections = world.user_tasks[payload.user_task], {}
        if payload.injection_task is not None:
            injections = world.attack.attack(user, world.injection_tasks[payload.injection_task])
        theirs = world.suite.load_and_inject_default_environment(injections)  # type: ignore[attr-defined]
        assert everything.reset(task).state_copy() == user.init_environment(theirs), task.task_id


def test_no_task_leaks_between_the_splits(everything: AgentDojoEnvironment) -> None:
    users: dict[str, set[tuple[str, str]]] = {}
    goals: dict[str, set[tuple[str, str]]] = {}
    texts: dict[str, set[str]] = {}
    for split in SPLITS:
        tasks = everything.tasks(split, injected=False) + everything.tasks(split, injected=True)
        payloads = [payload_of(task) for task in tasks]
        users[split] = {(p.suite, p.user_task) for p in payloads}
        goals[split] = {(p.suite, p.injection_task) for p in payloads if p.injection_task is not None}
        texts[split] = set()
        for p in payloads:
            world = everything._worlds[p.suite]
            texts[split].add(world.user_tasks[p.user_task].PROMPT)
            if p.injection_task is not None:
                texts[split].add(world.injection_tasks[p.injection_task].GOAL)
    assert not users["train"] & users["heldout"]
    assert not goals["train"] & goals["heldout"]
    assert not texts["train"] & texts["heldout"]
    assert sum(map(len, users.values())) == replay.USER_TASKS
    assert sum(map(len, goals.values())) == replay.INJECTION_TASKS


def test_heldout_suites_are_the_heldout_split() -> None:
    environment = AgentDojoEnvironment(("banking",), heldout_suites=("slack",))
    for split, suite in (("train", "banking"), ("heldout", "slack")):
        assert {payload_of(task).suite for task in environment.sample(split, 60, seed=0)} == {suite}


def test_sample_is_pure_across_instances_and_use(banking: AgentDojoEnvironment) -> None:
    drawn = banking.sample("train", 12, seed=5)
    banking.reset(drawn[0]).step(BANKING_READ)
    assert drawn == banking.sample("train", 12, seed=5)
    assert drawn == AgentDojoEnvironment(("banking",)).sample("train", 12, seed=5)


def test_episodes_of_one_task_do_not_see_each_other(banking: AgentDojoEnvironment) -> None:
    task = banking.tasks("train", injected=False)[0]
    pay: ToolCall = ToolCall(
        "send_money", {"recipient": "X1", "amount": 5.0, "subject": "s", "date": "2022-01-01"}
    )
    first, second = banking.reset(task), banking.reset(task)
    before = second.step(ToolCall("get_most_recent_transactions", {"n": 100}))
    assert not first.step(pay).is_error
    first.score(None)
    assert second.step(ToolCall("get_most_recent_transactions", {"n": 100})) == before
    fresh = banking.reset(task)
    assert fresh.step(ToolCall("get_most_recent_transactions", {"n": 100})) == before
    assert "X1" in first.step(ToolCall("get_most_recent_transactions", {"n": 100})).content


def test_a_call_keeps_its_arguments(everything: AgentDojoEnvironment) -> None:
    """AgentDojo's tools append to lists they are given; the rollout's own record must not change."""
    task = next(t for t in benign_tasks(everything) if payload_of(t).suite == "workspace")
    call = ToolCall(
        "create_calendar_event",
        {
            "title": "t",
            "start_time": "2024-05-20 10:00",
            "end_time": "2024-05-20 11:00",
            "participants": ["a@x.com"],
        },
    )
    assert not everything.reset(task).step(call).is_error
    assert call.arguments["participants"] == ["a@x.com"]


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("no_such_tool", {}),
        ToolCall("send_money", {}),
        ToolCall("send_money", {"recipient": 1, "amount": "much", "subject": [], "date": {}}),
        ToolCall("update_scheduled_transaction", {"id": 10**30}),
        ToolCall("get_most_recent_transactions", {"n": None}),
        ToolCall("get_most_recent_transactions", {"n": "[" * 5000}),
    ],
)
def test_a_bad_call_is_an_error_observation(banking: AgentDojoEnvironment, call: ToolCall) -> None:
    episode = banking.reset(banking.tasks("train", injected=False)[0])
    observation = episode.step(call)
    assert observation.is_error
    assert observation.content.startswith("Error: ")
    assert "errors.pydantic.dev" not in observation.content
    assert not episode.step(BANKING_READ).is_error  # the episode goes on
    episode.score("x")


def test_a_list_written_as_text_is_read_as_a_list(everything: AgentDojoEnvironment) -> None:
    task = next(t for t in benign_tasks(everything) if payload_of(t).suite == "workspace")
    call = ToolCall("send_email", {"recipients": '["a@x.com"]', "subject": "s", "body": "b"})
    observation = everything.reset(task).step(call)
    assert not observation.is_error
    assert "a@x.com" in observation.content


def test_long_and_broken_output_is_bounded_and_encodable() -> None:
    environment = AgentDojoEnvironment(("banking",), max_observation_chars=50)
    episode = environment.reset(environment.tasks("train", injected=False)[0])
    observation = episode.step(ToolCall("get_most_recent_transactions", {"n": 100}))
    assert len(observation.content) < 100
    assert observation.content.endswith("more characters are not shown]")
    echoed = episode.step(ToolCall("read_file", {"file_path": "\ud800"}))
    echoed.content.encode()


def test_same_calls_give_the_same_observations_in_another_process() -> None:
    """Clock and set order must not reach the policy: resume is bitwise."""
    script = (
        "from mosaic_rollout.environments.agentdojo import AgentDojoEnvironment as E\n"
        "from mosaic_rollout.types import ToolCall as C\n"
        "e = E(('workspace',)); p = e.reset(e.tasks('train', injected=False)[0])\n"
        "times = {'start_time': '2024-05-20 10:00', 'end_time': '2024-05-20 11:00'}\n"
        "people = [f'{c}@x.com' for c in 'abcdefgh']\n"
        "print(p.step(C('create_calendar_event', {'title': 't', 'participants': people, **times})).content)\n"
        "print(p.step(C('send_email', {'recipients': people, 'subject': 's', 'body': 'b'})).content)\n"
        "print(p.step(C('create_file', {'filename': 'f', 'content': 'c'})).content)\n"
        "print(p.step(C('get_sent_emails', {})).content)\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert "2024-05-15" in runs[0]


def test_tools_are_plain_openai_schemas(everything: AgentDojoEnvironment) -> None:
    counts = {}
    for task in everything.sample("train", 8, seed=0):
        tools = everything.reset(task).tools
        counts[payload_of(task).suite] = len(tools)
        for tool in tools:
            function = tool["function"]
            assert tool["type"] == "function"
            assert isinstance(function, dict)
            assert set(function) == {"name", "description", "parameters"}
            assert isinstance(function["parameters"], dict)
            assert "title" not in function["parameters"]
    assert counts == {"banking": 11, "slack": 11, "travel": 28, "workspace": 24}


def test_what_is_demonstrated_does_its_task_in_the_loop(everything: AgentDojoEnvironment) -> None:
    """Every user task, and under attack every fifth pair: calls that change the state are checked before."""
    chat = Chat(FAMILIES["qwen2.5"].tokenizer(), teach_loop=True)
    loop = AgentLoop(cast(Engine, None), chat, everything, Limits(100, 10**7, 10**7))

    async def rewrite(episode: Episode, steps: Sequence[Step], move: Move) -> Move:
        return rewritten(move)

    checked = 0
    for task in benign_tasks(everything) + everything.tasks("train", injected=True)[::50]:
        rollout = asyncio.run(demonstrated(loop, task, everything.reset(task), rewrite))
        assert (rollout.verdict.done, rollout.verdict.harm, rollout.status) == (True, False, "answered")
        assert all(step.well_formed for step in rollout.steps)
        checked += any(step.check for step in rollout.steps)
    assert checked > 30


def test_demonstrations_open_every_conversation_of_a_suite_and_leave_training() -> None:
    plain, shown = AgentDojoEnvironment(), AgentDojoEnvironment(demonstrations=2)
    openings = {}
    for task in shown.tasks("train", injected=False) + shown.tasks("heldout", injected=False):
        opening = shown.reset(task).messages[:-1]
        assert openings.setdefault(payload_of(task).suite, opening) == opening
        assert shown.reset(task).messages[-1] not in opening
    for suite, opening in openings.items():
        assert [m["role"] for m in opening].count("user") == 2, suite
        assert "<safety_thoughts>" in str(opening)
    kept = len(shown.tasks("train", injected=False))
    assert kept == len(plain.tasks("train", injected=False)) - 2 * len(openings)
    assert shown.tasks("heldout", injected=True) == plain.tasks("heldout", injected=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"suites": ("bank",)}, "no suite bank; it has banking"),
        ({"attack": "rude"}, "no attack 'rude'"),
        ({"attack": "dos"}, "choose an attack with a goal"),
        ({"version": "v9"}, "no benchmark version 'v9'"),
        ({"demonstrations": 50}, "not 50"),
    ],
)
def test_unknown_names_are_refused_with_what_there_is(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        AgentDojoEnvironment(**arguments)


def test_a_reset_is_a_copy_and_takes_milliseconds(everything: AgentDojoEnvironment) -> None:
    """Measured 1.7 ms for workspace, the largest; parsing it again would take 25 to 130."""
    task = next(t for t in benign_tasks(everything) if payload_of(t).suite == "workspace")
    everything.reset(task)
    times_ms = []
    for _ in range(20):
        start = time.perf_counter()
        everything.reset(task)
        times_ms.append(1000 * (time.perf_counter() - start))
    assert min(times_ms) < 8.0, times_ms  # the least: the others measure what else the machine is doing


def test_start_up_takes_under_two_seconds_and_imports_no_llm_package() -> None:
    script = (
        "import sys, time; start = time.process_time()\n"
        "from mosaic_rollout.environments.agentdojo import AgentDojoEnvironment\n"
        "e = AgentDojoEnvironment(); e.reset(e.sample('train', 1, 0)[0])\n"
        "heavy = {'anthropic', 'cohere', 'google.genai', 'openai', 'langchain', 'torch'} & set(sys.modules)\n"
        "print(time.process_time() - start, *heavy)\n"
    )
    seconds = []
    for _ in range(3):  # the best of three: the first may compile the package's bytecode
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        taken, *heavy = done.stdout.split()
        assert not heavy
        seconds.append(float(taken))
    assert min(seconds) < 2.0, seconds


def test_libyaml_is_used_where_there_is_one() -> None:
    from mosaic_rollout.environments.agentdojo import world

    assert getattr(yaml, "CSafeLoader", yaml.SafeLoader) is world._YAML_LOADER


def test_replay_command_prints_the_counts() -> None:
    command = [sys.executable, "-m", "tools.replay_agentdojo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for count in ("97/97", "26/26", "35/35"):
        assert count in done.stdout
