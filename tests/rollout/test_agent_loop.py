"""The plan-check-act loop on a scripted engine: what ends a rollout, what is trained, what forks inherit."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.loop.agent_loop import AgentLoop, Branching, Limits
from mosaic_rollout.types import Rollout
from tests.rollout.scripted import CountingEnvironment, ScriptedEngine, call
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer

READ = f"<think>look</think><safety_thoughts>ok</safety_thoughts>{call('read')}"
ANSWER = "<think>end</think>All done."


def play(
    say: Callable[[str, int], str],
    *,
    group_size: int = 2,
    branching: Branching = "independent",
    limits: Limits = Limits(max_steps=4, max_step_tokens=200, max_rollout_tokens=3000),  # noqa: B008
    tasks: int = 1,
) -> tuple[list[list[Rollout]], ScriptedEngine, Chat]:
    chat = Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)
    engine = ScriptedEngine(chat, say)
    environment = CountingEnvironment()
    loop = AgentLoop(engine, chat, environment, limits)
    drawn = environment.sample("train", tasks, 0)
    return asyncio.run(loop.groups(drawn, group_size=group_size, branching=branching, seed=3)), engine, chat


def read_then_answer(text: str, key: int) -> str:
    return ANSWER if "read 1" in text else READ


def test_a_rollout_holds_what_was_said_and_trains_only_that():
    [[rollout, _]], _, chat = play(read_then_answer)
    assert rollout.status == "answered"
    assert rollout.verdict.done
    assert [step.action for step in rollout.steps] == ["tool_call", "answer"]
    assert rollout.steps[0].observation == "read 1"
    trained = chat.decode(rollout.token_ids[rollout.trained])
    assert trained == READ + "<|im_end|>" + ANSWER + "<|im_end|>"
    assert (rollout.rollout_logprobs == np.where(rollout.trained, -1.0, 0.0)).all()
    for step in rollout.steps:
        assert rollout.trained[step.prompt_end : step.end].all()
        assert not rollout.trained[step.prompt_end - 1]
    check = "<safety_thoughts>ok</safety_thoughts>"
    assert rollout.steps[0].safety_tokens == len(check)  # one token a byte
    assert rollout.steps[0].check_start == rollout.steps[0].prompt_end + len("<think>look</think>")


def test_token_in_token_out():
    """Every request begins with exactly the ids of the rollout so far."""
    [[rollout, _]], engine, _ = play(read_then_answer, group_size=2)
    for request in (r for r in engine.requests if r.rollout_key == rollout.rollout_id):
        assert (rollout.token_ids[: len(request.token_ids)] == request.token_ids).all()


@pytest.mark.parametrize(
    ("say", "status"),
    [
        (lambda text, key: f"<think>no</think>{call('refusal_tool', reason='harm')}", "refused"),
        (lambda text, key: "<think>hm</think><tool_call>oops</tool_call>", "malformed"),
        (lambda text, key: "<think>" + "x" * 500, "truncated"),  # the turn's token limit
        (lambda text, key: READ, "truncated"),  # the step limit
        (
            lambda text, key: "x" if "Error: no tool" in text else f"<think>a</think>{call('nope')}",
            "answered",
        ),
        (lambda text, key: "x" if "Error: broken" in text else f"<think>a</think>{call('fail')}", "answered"),
    ],
)
def test_how_a_rollout_ends(say: Callable[[str, int], str], status: str):
    [[rollout, _]], _, _ = play(say)
    assert rollout.status == status


def test_the_rollouts_token_limit_holds():
    limits = Limits(max_steps=50, max_step_tokens=200, max_rollout_tokens=700)
    [[rollout, _]], _, _ = play(lambda text, key: READ, limits=limits)
    assert rollout.status == "truncated"
    assert len(rollout.token_ids) <= 700


@pytest.mark.parametrize("limit", ["steps", "tokens"])
def test_a_rollout_that_is_cut_off_ends_with_what_the_policy_said(limit: str):
    """What a tool shows last is kept as text; nobody reads its tokens, so they are not there."""
    [[long, _]], _, _ = play(lambda text, key: READ)
    limits = Limits(2, 200, 3000) if limit == "steps" else Limits(50, 200, long.steps[1].end + 2)
    [[rollout, _]], _, _ = play(lambda text, key: READ, limits=limits)
    assert rollout.status == "truncated"
    assert rollout.steps[-1].end == len(rollout.token_ids)
    assert rollout.trained[-1]
    assert [step.observation for step in rollout.steps] == ["read 1", "read 2"]


def test_a_fork_inherits_tokens_steps_and_state():
    """Trunks read and answer; siblings answer otherwise, from the same prefix and the same world state."""

    def say(text: str, key: int) -> str:
        if key >= 2 and not text.endswith("assistant\n"):  # a sibling goes on after the trunk's plan
            return "Something else."
        return read_then_answer(text, key)

    [group], _, chat = play(say, group_size=4, branching="fork_at_check")
    trunks, siblings = group[:2], group[2:]
    assert [r.parent_id for r in group] == [None, None, 0, 1]
    for trunk, sibling in zip(trunks, siblings, strict=True):
        position = sibling.fork_position
        assert position is not None
        assert (sibling.token_ids[:position] == trunk.token_ids[:position]).all()
        assert chat.decode(sibling.token_ids[:position]).endswith("</think>")
        assert sibling.steps[-1].answer == "Something else."
        assert sibling.steps[-1].plan in ("look", "end")  # the inherited plan belongs to the sibling's step
        assert (
            sibling.verdict.details["reads"] == len(sibling.steps) - 1
        )  # earlier calls were carried out again


def test_a_fork_at_a_step_begins_a_turn():
    [group], _, _ = play(read_then_answer, group_size=4, branching="fork_at_step")
    for sibling in group[2:]:
        assert sibling.fork_position in [step.prompt_end for step in group[0].steps]


def test_groups_are_told_apart():
    groups, _, _ = play(read_then_answer, tasks=3, group_size=2)
    assert [[r.rollout_id for r in g] for g in groups] == [[0, 1], [2, 3], [4, 5]]
    assert [[r.group_id for r in g] for g in groups] == [[0, 0], [1, 1], [2, 2]]
