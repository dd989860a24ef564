"""A client that repeats its conversation as text goes on from the tokens that were sampled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.endpoint.client import _reply
from mosaic_rollout.endpoint.server import read_completion
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.serving.history import History
from mosaic_rollout.serving.protocol import ApiError, read_request
from mosaic_rollout.serving.service import Service, Session
from mosaic_rollout.serving.stream import Head, whole_answer
from mosaic_rollout.types import ToolCall
from tests.rollout.scripted import CountingEnvironment, CountingEpisode, ScriptedEngine, call
from tests.rollout.templates_for_tests import KINDS, tokenizer
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer

Row = dict[str, Any]
"""JSON as it is read."""
TOOLS = list(CountingEpisode().tools)
TASK: list[Row] = [{"role": "user", "content": "go"}]
READ = f"<think> look\n</think>\n<safety_thoughts>ok</safety_thoughts> {call('read')}"


class Client:
    """What a client of OpenAI's does with a server, without the HTTP between them."""

    def __init__(self, say: Callable[[str, int], str], template: str = "", kind: str = "bytes") -> None:
        source = tokenizer(template, kind) if template else byte_tokenizer(WITH_TOOLS)
        self.chat = Chat(source, teach_loop=False)
        self.engine = ScriptedEngine(self.chat, say)
        self.service = Service(self.engine, self.chat, "m", 4000, 300)
        self.session = Session(History(self.chat))

    def ask(self, messages: list[Row], **more: object) -> Row:
        """The first choice's message."""
        return self.choices(messages, **more)[0]

    def choices(self, messages: list[Row], **more: object) -> list[Row]:
        whole_request = {"model": "m", "messages": messages, "tools": TOOLS, **more}
        asked = read_request(json.dumps(whole_request).encode())
        answered = asyncio.run(self.service.answer(self.session, asked))
        whole = json.loads(json.dumps(whole_answer(answered, asked, Head("m"), self.chat)))
        return [choice["message"] for choice in whole["choices"]]

    @property
    def last(self) -> np.ndarray:
        """The tokens of the last prompt."""
        return self.engine.requests[-1].token_ids


def reads_twice(text: str, key: int) -> str:
    return "<think>end</think>All done." if "read 2" in text else READ


def outputs(message: Row, text: str) -> list[Row]:
    return [{"role": "tool", "tool_call_id": one["id"], "content": text} for one in message["tool_calls"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["qwen2.5", "qwen3-thinking", "llama-3", "mistral", "phi-4"])
def test_an_agent_behind_the_endpoint_has_the_tokens_of_the_loop(template: str, kind: str):
    """Prompt, samples and observations are the very ids that AgentLoop gives the same episode."""

    def say(text: str, key: int) -> str:
        written = client.chat.call_format.write(ToolCall("read", {}))
        return "<think>end</think>All done." if "read 2" in text else f"<think> look\n</think>\n{written}"

    client = Client(say, template, kind)
    messages, episode = list(TASK), CountingEpisode()
    for _ in range(3):
        said = client.ask(messages)
        messages.append(said)
        if not said.get("tool_calls"):
            break
        messages += outputs(said, f"read {episode.reads + 1}")
        episode.reads += 1
    environment = CountingEnvironment()
    limits = Limits(max_steps=4, max_step_tokens=300, max_rollout_tokens=4000)
    loop = AgentLoop(ScriptedEngine(client.chat, say), client.chat, environment, limits)
    [[rollout]] = asyncio.run(
        loop.groups(environment.sample("train", 1, 0), group_size=1, branching="independent", seed=0)
    )
    assert said["content"] == "All done."
    assert client.session.history.turns[-1].token_ids.tolist() == rollout.token_ids.tolist()


@lru_cache
def hostile_client() -> Client:
    """One for all examples."""
    return Client(lambda text, key: "<think>p</think>hi")


def after_one_call(client: Client) -> tuple[list[Row], Row, np.ndarray]:
    said = client.ask(list(TASK))
    return [*TASK, said, *outputs(said, "read 1")], said, client.session.history.turns[-1].token_ids


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said,
        lambda said: {"role": "assistant", "tool_calls": said["tool_calls"]},
        lambda said: {**said, "content": f"<think>{said['reasoning_content']}</think>"},
        lambda said: {
            **said,
            "tool_calls": [
                {**one, "function": {"name": "read", "arguments": "{ }"}} for one in said["tool_calls"]
            ],
        },
    ],
)
def test_an_answer_is_known_however_the_client_writes_it(change: Callable[[Row], Row]):
    client = Client(reads_twice)
    messages, said, tokens = after_one_call(client)
    client.ask([messages[0], change(said), *messages[2:]])
    assert client.last[: len(tokens)].tolist() == tokens.tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [{**m[0], "content": "go on"}, *m[1:]],
        lambda m: [m[0], {**m[1], "content": "I say"}, *m[2:]],
        lambda m: [m[0], {**m[1], "reasoning_content": "another plan"}, *m[2:]],
        lambda m: [m[0], {**m[1], "tool_calls": [{**m[1]["tool_calls"][0], "id": "other"}]}, *m[2:]],
    ],
)
def test_what_the_client_changed_is_another_conversation(change: Callable[[list[Row]], list[Row]]):
    """It is rendered from its text; nothing that was sampled is taken for it."""
    client = Client(reads_twice)
    messages, _, _ = after_one_call(client)
    client.ask(change(messages))
    assert client.session.history.turns[-1].prompt.parent is None


def test_two_answers_that_look_the_same_are_not_taken_for_each_other():
    """Of two choices with the same words, the one that is meant is known by its thoughts alone."""
    client = Client(lambda text, key: f"<think>{'ab'[key % 2]}</think>Yes?")
    first, second = client.choices(list(TASK), n=2)
    for said, parent in ((first, 0), (second, 1)):
        client.ask([*TASK, said, {"role": "user", "content": "yes"}])
        turn = client.session.history.turns[-1]
        assert turn.prompt.parent is client.session.history.turns[parent]
    plain = {"role": "assistant", "content": "Yes?"}
    client.ask([*TASK, plain, {"role": "user", "content": "yes"}])
    assert client.session.history.turns[-1].prompt.parent is None


def test_a_turn_that_was_cut_off_is_ended_by_a_token_that_was_not_sampled():
    client = Client(lambda text, key: "<think>x</think>one two three")
    said = client.ask(list(TASK), max_tokens=21)
    assert said["content"] == "one t"
    cut = client.session.history.turns[-1]
    client.ask([*TASK, said, {"role": "user", "content": "more"}])
    assert client.last[: len(cut.token_ids) + 1].tolist() == [
        *cut.token_ids.tolist(),
        client.chat.stop_token_ids[0],
    ]


def test_a_stop_text_ends_the_turn_and_is_not_told():
    client = Client(lambda text, key: "one two three")
    said = client.ask(list(TASK), stop=["wo", "zz"])
    assert said["content"] == "one t"
    turn = client.session.history.turns[-1]
    assert client.chat.decode(turn.completion.token_ids) == "one two"


def test_several_calls_of_one_turn_are_answered_together():
    client = Client(lambda text, key: "done" if "read 1" in text else call("read") + call("read"))
    messages, said, tokens = after_one_call(client)
    assert len(said["tool_calls"]) == 2
    client.ask(messages)
    assert client.last[: len(tokens)].tolist() == tokens.tolist()
    assert client.chat.decode(client.last[len(tokens) :]).count("read 1") == 2
    assert len(client.ask(list(TASK), parallel_tool_calls=False)["tool_calls"]) == 1


def test_the_oldest_answers_of_a_server_are_forgotten():
    client = Client(reads_twice)
    client.session = Session(History(client.chat, keep_tokens=1500))
    for number in range(6):
        client.ask([{"role": "user", "content": f"go {number}"}])
    turns = client.session.history.turns
    assert 1 <= len(turns) < 6
    assert sum(len(turn.token_ids) for turn in turns) <= 1500


_KEYS = ("type", "text", "function", "name", "arguments", "id")
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "read", "<think>a</think>b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3),
    max_leaves=4,
)
_PARTS = ("content", "tool_calls", "tool_call_id", "name", "refusal", "reasoning_content", "odd")
_MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "function", "no"])},
    optional=dict.fromkeys(_PARTS, _VALUES),
)
_ASKED = st.sampled_from(["tools", "tool_choice", "stop", "n", "seed", "stream_options"])


@settings(max_examples=60)
@given(st.lists(_MESSAGES, max_size=4), st.dictionaries(_ASKED, _VALUES))
def test_whatever_is_asked_is_answered_or_refused_as_openai_does(messages: list[Row], more: Row):
    status = 200
    try:
        assert hostile_client().ask([*TASK, *messages], **more)
    except ApiError as error:
        status = error.status
    assert status < 500


def test_a_plan_and_a_check_reach_our_own_client():
    """`mosaic_fast.evaluate` over an endpoint sees the turn that the model wrote."""
    client = Client(lambda text, key: "<think>p</think><safety_thoughts>c</safety_thoughts>hi")
    said = client.ask(list(TASK))
    reply = _reply(read_completion(json.dumps({"choices": [{"message": said}]})))
    assert reply.text == "<think>p</think><safety_thoughts>c</safety_thoughts>hi"
