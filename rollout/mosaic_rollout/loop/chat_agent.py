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
from mosaic_rollout.loop.play import Limits, Play, PolicyTurn
from mosaic_rollout.types import (
    Action,
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
        play = _TextPlay(self, http, episode, seed)
        status, verdict = await play.finish()
        return ChatRollout(
            task=task,
            steps=tuple(play.steps),
            status=status,
            verdict=verdict,
            messages=tuple(episode.messages),
            prompt_tokens=play.prompt_tokens,
            generated_tokens=play.generated_tokens,
        )


class _TextPlay(Play):
    """An episode played in text: the conversation so far, and what the server said of its tokens."""

    def __init__(self, agent: ChatAgent, http: httpx.AsyncClient, episode: Episode, seed: int) -> None:
        super().__init__(episode, agent.limits, agent.tool_timeout_s)
        self._agent, self._http, self._seed = agent, http, seed
        self._native = agent.protocol == "native"
        self._tools = self._shown_tools()
        self._messages = self._opening()
        self._reply: ChatReply | None = None  # the last one
        self.prompt_tokens = self.generated_tokens = 0
        self._length = 0  # tokens of the conversation after the last reply, 0 while unknown

    def room(self) -> int:
        return min(self.limits.max_step_tokens, self.limits.max_rollout_tokens - self._length)

    async def turn(self, max_new_tokens: int) -> PolicyTurn | None:
        if self._native:
            self._tools = self._shown_tools()
        try:
            reply = await self._agent.endpoint.complete(
                self._http,
                self._messages,
                () if self._written else self._tools,
                max_tokens=max_new_tokens,
                seed=self._seed + len(self.steps),
            )
        except ContextFull:
            return None
        self.prompt_tokens += reply.prompt_tokens
        self.generated_tokens += reply.completion_tokens
        self._length = reply.prompt_tokens + reply.completion_tokens
        self._reply = reply
        if self._native and reply.calls and not reply.cut_off:
            return PolicyTurn(_native_steps(reply))
        return PolicyTurn((self._text_step(reply),), cut_off=reply.cut_off)

    def show(self, steps: Sequence[Step]) -> bool:
        """The turn as it came and what followed it; in the loop a thought is part of the conversation."""
        reply = self._reply
        if reply is None:
            raise ValueError("a turn is shown after it was taken")
        turn = reply.message if self._native else {**reply.message, "content": reply.text}
        call_ids = [call.call_id for call in reply.calls] or ["call"]
        self._messages.append(for_server(turn))
        self._messages += map(self._following, steps, call_ids)
        return True

    def _following(self, step: Step, call_id: str) -> Message:
        """What followed a step, as a message."""
        if step.call is None:
            return for_server({"role": "user", "content": step.observation})
        named: Message = {} if self._native else {"name": step.call.name}
        message = for_server({"role": "tool", "tool_call_id": call_id, **named, "content": step.observation})
        return as_plain_text(message) if self._written else message

    def _text_step(self, reply: ChatReply) -> Step:
        """A turn as the grammar reads it; without the grammar's plan and check, any text is an answer."""
        text = reply.text
        if not self._native:
            text += "".join(_written(call) for call in reply.calls)
        think_is_open = begins_in_plan(text, HERMES)  # the prompt ended with the tag
        turn = parse_turn(text, HERMES, think_is_open=think_is_open, tools=self._tools)
        if self._native:
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

    def _opening(self) -> list[Message]:
        """The episode's messages, with the loop and the tools written into the system message where asked."""
        parts = []
        if self._agent.teach_loop and not self._native:
            parts.append(load_prompt("loop_v2"))
        if self._written:
            parts.append(load_prompt("call_format_v1").format(tools=written_tools(self._tools)))
        messages = [for_server(message) for message in self.episode.messages]
        if self._written:  # no message may need a server with tools
            messages = [as_plain_text(message) for message in messages]
        if not parts:
            return messages
        if messages and messages[0]["role"] == "system":
            parts.insert(0, str(messages.pop(0)["content"]))
        return [{"role": "system", "content": "\n\n".join(parts)}, *messages]

    def _shown_tools(self) -> list[ToolSchema]:
        tools = [*self.episode.tools, REFUSAL_SCHEMA]
        return [changed_tool(tool, without_servers_words) for tool in tools]

    @property
    def _written(self) -> bool:
        return self._agent.write_tools and not self._native

    def new_tools(self) -> str:
        """As text in the loop; with native calls the next request has them instead."""
        return "" if self._native else super().new_tools()


def _native_steps(reply: ChatReply) -> tuple[Step, ...]:
    """The steps of a turn's native calls; the first one bears the turn's text and tokens."""
    steps: list[Step] = []
    for native in reply.calls:
        call = _parsed(native)
        action: Action = "malformed" if call is None else "tool_call"
        if call is not None and call.name == REFUSAL_TOOL:
            action = "refusal"
        steps.append(_step(reply, reply.text, action, call=call))
        reply = replace(reply, text="", completion_tokens=0)
    return tuple(steps)


def as_plain_text(message: Message) -> Message:
    """A message with its calls written into its text, or as the user's where it is a tool's."""
    return with_written_output(with_written_calls(message))


def _step(
    reply: ChatReply,
    text: str,
    action: Action,
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
