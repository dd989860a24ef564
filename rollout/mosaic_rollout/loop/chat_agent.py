"""The plan-check-act loop over an OpenAI-compatible endpoint, in text: evaluation needs no token ids.

Two ways to read a model's turn:

- `loop`: the text holds plan, check and action, and is parsed by the grammar that training uses. A server
  that has parsed calls or thoughts out of the text is undone.
- `native`: the model's own tool calls, mapped to actions without plan and check. Several calls in one message
  are carried out in their order, each a step.

The server renders and tokenises. Words that would steer a model of the families are broken up in data by a
space here, as training does; what its template does with the rest is the server's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import httpx

from mosaic_rollout.chat.call_formats import HERMES
from mosaic_rollout.chat.grammar import (
    REFUSAL_SCHEMA,
    REFUSAL_TOOL,
    begins_in_plan,
    parse_turn,
)
from mosaic_rollout.chat.json_calls import call_of
from mosaic_rollout.chat.messages import (
    changed_tool,
    for_server,
    with_written_calls,
    with_written_output,
    without_servers_words,
    written_tools,
)
from mosaic_rollout.chat.prompts import load_prompt
from mosaic_rollout.endpoint.client import ChatEndpoint, ChatReply, ContextFull, NativeCall
from mosaic_rollout.loop.agent_loop import Limits
from mosaic_rollout.loop.tools import EpisodeTools
from mosaic_rollout.types import (
    Dialogue,
    Environment,
    Episode,
    Message,
    Status,
    Step,
    Task,
    ToolCall,
    ToolSchema,
    Verdict,
)

Protocol = Literal["loop", "native"]


@dataclass(frozen=True)
class ChatRollout:
    """One trajectory as an endpoint played it. A step's span counts tokens within its own request."""

    task: Task
    steps: tuple[Step, ...]
    status: Status
    verdict: Verdict
    messages: tuple[Message, ...]  # the opening messages
    prompt_tokens: int  # summed over requests, as the server reports them
    generated_tokens: int


@dataclass(frozen=True)
class ChatAgent:
    """Plays tasks with one endpoint. Holds no state of its own between tasks.

    teach_loop: write the text that teaches the loop into the system message (`loop` only).
    write_tools: write the tools into the system message instead of sending them as such, for servers that
    take none (`loop` only).
    """

    endpoint: ChatEndpoint
    limits: Limits
    protocol: Protocol = "loop"
    teach_loop: bool = True
    write_tools: bool = False
    tool_timeout_s: float = 0.0

    async def play(
        self, http: httpx.AsyncClient, environment: Environment, task: Task, seed: int
    ) -> ChatRollout:
        """One episode from reset to verdict. UserError where the endpoint fails for good."""
        episode = environment.reset(task)
        walk = _ChatWalk(self, http, episode, seed)
        status, verdict = await walk.calls.verdict(*await walk.run())
        return ChatRollout(
            task=task,
            steps=tuple(walk.steps),
            status=status,
            verdict=verdict,
            messages=tuple(episode.messages),
            prompt_tokens=walk.prompt_tokens,
            generated_tokens=walk.generated_tokens,
        )


class _ChatWalk:
    """An episode while it is being played: the conversation so far and the steps it was parsed to."""

    def __init__(self, agent: ChatAgent, http: httpx.AsyncClient, episode: Episode, seed: int) -> None:
        self._agent, self._http, self._episode, self._seed = agent, http, episode, seed
        self.calls = EpisodeTools(episode, agent.tool_timeout_s)
        self._tools = self._shown_tools()
        self._messages = self._opening()
        self.steps: list[Step] = []
        self.prompt_tokens = self.generated_tokens = 0
        self._length = 0  # tokens of the conversation after the last reply, 0 while unknown

    async def run(self) -> tuple[Status, str | None]:
        """Play to the end: how it ended, and the final answer if there is one."""
        limits = self._agent.limits
        while len(self.steps) < limits.max_steps:
            budget = min(limits.max_step_tokens, limits.max_rollout_tokens - self._length)
            if budget < 1:
                break
            try:
                reply = await self._ask(budget)
            except ContextFull:
                break
            if reply.cut_off:
                self.steps.append(self._text_step(reply))
                break
            calls = reply.calls if self._agent.protocol == "native" else ()
            ending = await (self._act(reply, calls) if calls else self._follow(reply))
            if ending is not None:
                return ending
        return "truncated", None

    async def _ask(self, budget: int) -> ChatReply:
        send_tools = not self._written
        if send_tools and self._agent.protocol == "native":
            self._tools = self._shown_tools()
        reply = await self._agent.endpoint.complete(
            self._http,
            self._messages,
            self._tools if send_tools else (),
            max_tokens=budget,
            seed=self._seed + len(self.steps),
        )
        self.prompt_tokens += reply.prompt_tokens
        self.generated_tokens += reply.completion_tokens
        self._length = reply.prompt_tokens + reply.completion_tokens
        return reply

    async def _follow(self, reply: ChatReply) -> tuple[Status, str | None] | None:
        """Carry out a turn that is read as text; how the episode ends with it, or None."""
        step = self._text_step(reply)
        if step.action == "tool_call" and step.call is not None:
            text = (await self.calls.observe(step.call)).content + self._new_tools()
            self._append(reply, self._tool_message(reply, step.call, text))
        elif step.action == "answer" and isinstance(self._episode, Dialogue):
            following = None
            if await self.calls.settle():
                following = self._episode.next_user_message(step.answer or "")
            if following is None:
                self.steps.append(step)
                return "answered", step.answer
            text = following + self._new_tools()
            self._append(reply, for_server({"role": "user", "content": text}))
        else:
            self.steps.append(step)
            if step.action == "answer":
                return "answered", step.answer
            return ("refused" if step.action == "refusal" else "malformed"), None
        self.steps.append(replace(step, observation=text))
        return None

    async def _act(self, reply: ChatReply, calls: Sequence[NativeCall]) -> tuple[Status, str | None] | None:
        """Carry out native calls, each a step; the first one bears the turn's text and tokens."""
        answers: list[Message] = []
        for number, native in enumerate(calls):
            call = _parsed(native)
            step = self._native_step(reply, call, first=number == 0)
            if call is None or call.name == REFUSAL_TOOL:
                self.steps.append(step)
                return ("malformed" if call is None else "refused"), None
            text = (await self.calls.observe(call)).content
            self.steps.append(replace(step, observation=text))
            answers.append({"role": "tool", "tool_call_id": native.call_id, "content": text})
        self._messages += [for_server(message) for message in (reply.message, *answers)]
        return None

    def _text_step(self, reply: ChatReply) -> Step:
        """A turn as the grammar reads it; without the grammar's plan and check, any text is an answer."""
        text = reply.text
        if self._agent.protocol == "loop":
            text += "".join(_written(call) for call in reply.calls)
        think_is_open = begins_in_plan(text, HERMES)  # the prompt ended with the tag
        turn = parse_turn(text, HERMES, think_is_open=think_is_open, tools=self._tools)
        if self._agent.protocol == "native":
            answer = text[turn.plan_span[1] if turn.plan_span else 0 :].strip()
            return _step(reply, text, "answer" if answer else "malformed", answer=answer or None)
        safety_tokens = 0
        if turn.check_span is not None:  # the server counts whole turns: the check's share by characters
            start, end = turn.check_span
            safety_tokens = round(reply.completion_tokens * (end - start) / len(text))
        step = _step(reply, text, turn.action, call=turn.call, answer=turn.answer)
        return replace(
            step,
            plan=turn.plan,
            check=turn.check,
            safety_tokens=safety_tokens,
            well_formed=turn.well_formed,
        )

    def _native_step(self, reply: ChatReply, call: ToolCall | None, *, first: bool) -> Step:
        if not first:
            reply = replace(reply, text="", completion_tokens=0)
        if call is None:
            return _step(reply, reply.text, "malformed")
        return _step(reply, reply.text, "refusal" if call.name == REFUSAL_TOOL else "tool_call", call=call)

    def _append(self, reply: ChatReply, answer: Message) -> None:
        """The turn as it came and what answers it; in the loop a thought is part of the conversation."""
        loop = self._agent.protocol == "loop"
        turn: Message = {**reply.message, "content": reply.text} if loop else reply.message
        self._messages += [for_server(turn), answer]

    def _tool_message(self, reply: ChatReply, call: ToolCall, text: str) -> Message:
        call_id = reply.calls[0].call_id if reply.calls else "call"
        message: Message = {"role": "tool", "tool_call_id": call_id, "name": call.name, "content": text}
        message = for_server(message)
        return as_plain_text(message) if self._written else message

    def _opening(self) -> list[Message]:
        """The episode's messages, with the loop and the tools written into the system message where asked."""
        agent, parts = self._agent, []
        if agent.protocol == "loop" and agent.teach_loop:
            parts.append(load_prompt("loop_v2"))
        if self._written:
            parts.append(load_prompt("call_format_v1").format(tools=written_tools(self._tools)))
        messages = [for_server(message) for message in self._episode.messages]
        if self._written:  # no message may need a server with tools
            messages = [as_plain_text(message) for message in messages]
        if not parts:
            return messages
        if messages and messages[0]["role"] == "system":
            parts.insert(0, str(messages.pop(0)["content"]))
        return [{"role": "system", "content": "\n\n".join(parts)}, *messages]

    def _shown_tools(self) -> list[ToolSchema]:
        tools = [*self._episode.tools, REFUSAL_SCHEMA]
        return [changed_tool(tool, without_servers_words) for tool in tools]

    @property
    def _written(self) -> bool:
        return self._agent.write_tools and self._agent.protocol == "loop"

    def _new_tools(self) -> str:
        """Tools that came in mid-episode, as text; with native calls the next request has them instead."""
        return self.calls.new_text() if self._agent.protocol == "loop" else ""


def as_plain_text(message: Message) -> Message:
    """A message with its calls written into its text, or as the user's where it is a tool's."""
    return with_written_output(with_written_calls(message))


def _step(
    reply: ChatReply,
    text: str,
    action: Literal["tool_call", "refusal", "answer", "malformed"],
    *,
    call: ToolCall | None = None,
    answer: str | None = None,
) -> Step:
    return Step(
        prompt_end=reply.prompt_tokens,
        end=reply.prompt_tokens + reply.completion_tokens,
        text=text,
        plan=None,
        check=None,
        action=action,
        call=call,
        answer=answer,
        observation=None,
        safety_tokens=0,
        well_formed=False,
    )


def _parsed(native: NativeCall) -> ToolCall | None:
    """A native call with its arguments read; None where they are no JSON object, or not there at all."""
    return call_of({"name": native.name, "arguments": native.arguments})


def _written(native: NativeCall) -> str:
    """A native call as text of the loop; arguments that are no JSON object are a text there, and malformed.

    Those that are one stand as the server told them.
    """
    arguments = json.dumps(native.arguments) if _parsed(native) is None else native.arguments
    return f'<tool_call>{{"name":{json.dumps(native.name)},"arguments":{arguments}}}</tool_call>'
