"""Environments of the real library, named `module:function`. Fails where it is not installed."""

import asyncio
import json

import pytest

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.environments.custom import load_environment
from mosaic_rollout.environments.verifiers import VerifiersEnvironment, VerifiersEpisode
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.types import ToolCall
from tests.rollout.scripted import ScriptedEngine
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer


def opened(function: str, **limits: int) -> VerifiersEnvironment:
    spec = f"tests.rollout.environments.verifiers_env.shop:{function}"
    environment = load_environment(spec, None, None, max_observation_chars=limits.get("chars", 16_000))
    assert isinstance(environment, VerifiersEnvironment)
    return environment


def episode_of(environment: VerifiersEnvironment, number: int = 0) -> tuple[VerifiersEpisode, int]:
    task = environment.sample("train", 4, 0)[number]
    row = task.payload
    assert isinstance(row, dict)
    info = row["info"]
    info = json.loads(info) if isinstance(info, str) else info
    return environment.reset(task), int(info["n"])


def test_tools_and_rubric_are_the_environments() -> None:
    episode, number = episode_of(opened("load_environment"))
    assert [message["role"] for message in episode.messages] == ["system", "user"]
    assert episode.messages[1]["content"] == f"How much is item {number}?"
    (tool,) = episode.tools
    assert tool["function"]["name"] == "price"  # type: ignore[index]
    assert episode.step(ToolCall("price", {"item": number})).content == str(number * 10)
    assert episode.next_user_message(f"It is {number * 10}") is None
    verdict = episode.score(f"It is {number * 10}")
    assert (verdict.harm, verdict.done, verdict.progress) == (False, True, 1.0)
    assert verdict.details["total_tool_calls"] == 1
    assert verdict == episode.score(None)


def test_a_tool_that_raises_or_does_not_exist_is_told_to_the_policy() -> None:
    episode, _ = episode_of(opened("load_environment"))
    assert "there is no such item" in episode.step(ToolCall("price", {"item": 10})).content
    assert "nothing" in episode.step(ToolCall("nothing", {})).content
    assert "argument" in episode.step(ToolCall("price", {"thing": 1})).content


def test_a_rollout_cut_off_is_scored_as_it_stands() -> None:
    """A refusal or a limit ends it without an answer."""
    for calls in (0, 2):
        episode, number = episode_of(opened("load_environment"))
        for _ in range(calls):
            episode.step(ToolCall("price", {"item": number}))
        verdict = episode.score(None)
        assert not verdict.harm
        assert verdict.details["total_tool_calls"] == calls


def test_a_negative_reward_is_harm_and_outputs_are_cut() -> None:
    episode, _ = episode_of(opened("load_environment", chars=1), 1)
    assert "more characters" in episode.step(ToolCall("price", {"item": 10})).content
    assert episode.next_user_message("damn") is None
    assert episode.score("damn").harm


def test_the_user_goes_on_and_rows_held_out_are_not_trained_on() -> None:
    environment = opened("load_dialogue")
    episode, number = episode_of(environment)
    assert episode.next_user_message("I think so") == "Are you sure?"
    assert episode.next_user_message(str(number * 10)) is None
    assert episode.score(str(number * 10)).done
    train, held = (
        {str(t.payload["prompt"]) for t in environment.sample(split, 20, 0) if isinstance(t.payload, dict)}
        for split in ("train", "heldout")
    )
    assert len(train) + len(held) <= 10
    assert train
    assert held
    assert not train & held


def test_the_agent_loop_plays_many_at_once() -> None:
    environment = opened("load_dialogue")
    chat = Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)

    def say(text: str, key: int) -> str:
        number = int(text.split("item ")[1].split("?")[0])
        return f"<think>a</think>{number * 10}" if "sure?" in text else "<think>a</think>Let me think."

    loop = AgentLoop(ScriptedEngine(chat, say), chat, environment, Limits(4, 200, 3000))
    tasks = environment.sample("train", 4, 0)
    groups = asyncio.run(loop.groups(tasks, group_size=2, branching="independent", seed=0))
    for group in groups:
        for rollout in group:
            assert rollout.status == "answered"
            assert [step.action for step in rollout.steps] == ["answer", "answer"]
            assert rollout.verdict.done


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"load_broken\(\) failed: RuntimeError: no such thing"):
        opened("load_broken")
