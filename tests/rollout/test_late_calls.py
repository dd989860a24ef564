"""A call that overruns its limit is waited for before anything is said of the episode, within bounds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from mosaic_fast.run.metrics import rollout_figures
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.environments import guarded
from mosaic_rollout.environments.guarded import GuardedEpisode
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
from mosaic_rollout.loop.tools import EpisodeTools
from mosaic_rollout.types import Message, Observation, Rollout, Task, ToolCall, ToolSchema, Verdict
from tests.rollout.scripted import ScriptedEngine, call
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer

WIRE = ToolCall("wire", {})


class Bank(GuardedEpisode):
    """`wire` does its harm only after `go`; the user goes on once, and hears whether it was done."""

    def __init__(self) -> None:
        super().__init__(ForeignCode("the bank"), 1000)
        self.messages: Sequence[Message] = [{"role": "user", "content": "wire it"}]
        function = {"name": "wire", "description": "Wire.", "parameters": {"type": "object"}}
        self.tools: Sequence[ToolSchema] = [{"type": "function", "function": function}]
        self.go, self.sent, self.heard = threading.Event(), False, 0

    def next_user_message(self, final_answer: str) -> str | None:
        with self._alone("the user's next message"):
            self.heard += 1
            return f"sent: {self.sent}" if self.heard == 1 else None

    def _carry_out(self, call: ToolCall) -> Observation:
        self.go.wait(30)
        self.sent = True
        return Observation("sent")

    def _judge(self, final_answer: str | None) -> Verdict:
        return Verdict(harm=self.sent, done=False, progress=0.0)


class Banks:
    name = "banks"

    def __init__(self, seconds: float | None) -> None:
        """seconds: after which a wire goes out; None: it never does."""
        self.seconds, self.opened = seconds, list[Bank]()

    def sample(self, split: str, count: int, seed: int) -> list[Task]:
        return [Task("t", "harmful", split)]

    def reset(self, task: Task) -> Bank:
        bank = Bank()
        if self.seconds is not None:
            threading.Timer(self.seconds, bank.go.set).start()
        self.opened.append(bank)
        return bank


def play(banks: Banks, timeout_s: float) -> Rollout:
    chat = Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)

    def say(text: str, key: int) -> str:
        return "<think>end</think>Done." if "Error: " in text else f"<think>go</think>{call('wire')}"

    loop = AgentLoop(ScriptedEngine(chat, say), chat, banks, Limits(4, 300, 8000), tool_timeout_s=timeout_s)
    tasks = banks.sample("train", 1, 0)
    return asyncio.run(loop.groups(tasks, group_size=1, branching="independent", seed=1))[0][0]


def test_a_late_harm_is_harm():
    """The limit is far below the call's time, twice the limit far above."""
    rollout = play(Banks(0.6), timeout_s=0.5)
    assert "did not finish within" in str(rollout.steps[0].observation)
    assert rollout.steps[1].observation == "sent: True", "the user speaks after the call, too"
    assert (rollout.status, rollout.verdict.harm) == ("answered", True)
    assert rollout.tool_errors == 1


def test_a_call_without_an_end_leaves_the_episode_unresolved():
    banks = Banks(None)
    try:
        rollout = play(banks, timeout_s=0.05)
        assert rollout.status == "truncated"
        assert (rollout.verdict.harm, rollout.verdict.done) == (True, False), "what it tried counts as done"
        assert banks.opened[0].heard == 0, "nobody speaks to an episode that is being changed"
        assert rollout_figures([rollout])["env/unresolved"] == 1
    finally:
        banks.opened[0].go.set()


def test_a_verdict_that_is_asked_for_directly_waits_too(monkeypatch: pytest.MonkeyPatch):
    bank = Bank()
    seen = asyncio.run(EpisodeTools(bank, 0.05).observe(WIRE))
    assert seen.is_error
    monkeypatch.setattr(guarded, "PATIENCE_S", 0.05)
    with pytest.raises(UserError, match="a tool call has not ended"):
        bank.score(None)
    assert "earlier call is still running" in bank.step(WIRE).content
    monkeypatch.setattr(guarded, "PATIENCE_S", 30.0)
    threading.Timer(0.1, bank.go.set).start()
    assert bank.score(None).harm
