"""Conversations of a JSON Lines file as episodes that can be demonstrated, but not played otherwise.

A line is an object with `messages` and `tools` as OpenAI has them, as for its fine-tuning:

- An assistant's message makes calls or answers. Several calls of one message become turns of one call each,
  each followed by its own output.
- Its plan is what stands in `<think>`, in `reasoning_content`, `reasoning` or `thinking`, and beside calls;
  its check is what stands in `<safety_thoughts>`. A `refusal` is a call of `refusal_tool`.
- `weight` 0 makes a message context that is not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from mosaic_rollout.chat.call_formats import HERMES
from mosaic_rollout.chat.grammar import REFUSAL_SCHEMA, REFUSAL_TOOL, parse_turn
from mosaic_rollout.chat.messages import plain_message
from mosaic_rollout.environments.custom.rows import row_message
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign.checks import find_schema, shown, wrong_arguments
from mosaic_rollout.plain_json import read_json, read_lines
from mosaic_rollout.types import (
    JsonValue,
    Message,
    Move,
    Observation,
    Task,
    TaskKind,
    ToolCall,
    ToolSchema,
    Verdict,
)

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Recorded:
    """One conversation: how it opens, the agent's moves, and what followed each of them."""

    where: str  # file and line
    task: Task
    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...]
    moves: tuple[Move, ...]
    followed_by: tuple[str | None, ...]  # a move: a tool's output or the user's next word; None at the end

    def episode(self) -> RecordedEpisode:
        return RecordedEpisode(self)


class RecordedEpisode:
    """A conversation while it is gone through again: whatever is called, what was recorded follows."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded, self._place = recorded, 0
        self.messages: Sequence[Message] = recorded.messages
        self.tools: Sequence[ToolSchema] = recorded.tools

    def demonstrate(self) -> Sequence[Move]:
        return self._recorded.moves

    def step(self, call: ToolCall) -> Observation:
        return Observation(self._following() or "")

    def next_user_message(self, final_answer: str) -> str | None:
        return self._following()

    def score(self, final_answer: str | None) -> Verdict:
        """A conversation that somebody chose to train on counts as done."""
        return Verdict(harm=False, done=True, progress=1.0)

    def _following(self) -> str | None:
        self._place += 1
        return self._recorded.followed_by[self._place - 1]


def read_conversations(path: Path) -> list[Recorded]:
    """The conversations of a file. UserError names the file, the line and what is wrong with it."""
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sft.conversations: {path} cannot be read: {error}") from None
    if not lines:
        raise UserError(f"sft.conversations: {path} is empty; write one conversation a line")
    return [_conversation(path, number, line) for number, line in lines]


def _conversation(path: Path, number: int, line: str) -> Recorded:
    where = f"{path}, line {number}"
    try:
        found = read_json(line, unique_keys=True)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("messages"), list):
        raise UserError(f'{where}: a conversation is an object with "messages", and "tools" where it calls')
    kind = found.get("kind", "benign")
    if kind not in get_args(TaskKind):
        raise UserError(f'{where}: "kind" is {shown(kind)}; it is one of {", ".join(get_args(TaskKind))}')
    tools = _tools(where, found.get("tools"))
    messages = [_message(f"{where}, message {place}", one) for place, one in enumerate(found["messages"], 1)]
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise UserError(f"{where}: there is no assistant's message, so nothing can be learnt from it")
    for place, message in enumerate(messages[:first], 1):
        if message["role"] == "tool":
            raise UserError(f"{where}, message {place}: a tool's output stands before any call")
    if not first or messages[first - 1]["role"] != "user":
        raise UserError(f"{where}, message {first + 1}: the assistant speaks before the user has")
    moves, following = _turns(where, messages, first, tools)
    if not any(move.trained for move in moves):
        raise UserError(f"{where}: every message of the assistant's has weight 0, so nothing is learnt")
    task = Task(f"{path.stem}-{number}", cast(TaskKind, kind), "train")
    return Recorded(where, task, tuple(messages[:first]), tools, tuple(moves), tuple(following))


def _tools(where: str, found: JsonValue) -> tuple[ToolSchema, ...]:
    """The schemas of a row, without that of `refusal_tool`, which the loop adds."""
    if found is None:
        return ()
    if isinstance(found, str):  # as data sets with one type a column keep them
        try:
            found = read_json(found)
        except ValueError as error:
            raise UserError(f'{where}: "tools" is a text that is no JSON ({error})') from None
    tools = found if isinstance(found, list) else [found]
    kept: list[ToolSchema] = []
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(
                f'{where}: "tools" is a list of {{"type": "function", "function": {{"name", ...}}}}, '
                f"there is {shown(tool)}"
            )
        if function["name"] != REFUSAL_TOOL:
            kept.append({"type": "function", "function": function})
    return tuple(kept)


def _message(where: str, found: JsonValue) -> Message:
    """A message as the loop reads it; of an assistant's only text and calls are looked at."""
    if isinstance(found, Mapping) and found.get("role") == "assistant" and found.get("content") is None:
        found = {**found, "content": ""}  # beside calls, a refusal or thoughts
    message = row_message(where, found)
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise UserError(f'{where}: "weight" is {shown(weight)}; it is 1, or 0 for what is not trained on')
    return {**plain_message(message), "weight": weight}


def _turns(
    where: str, messages: Sequence[Message], first: int, tools: Sequence[ToolSchema]
) -> tuple[list[Move], list[str | None]]:
    """The moves from the first message of the assistant's on, and what followed each."""
    moves: list[Move] = []
    following: list[str | None] = []
    place = first
    while place < len(messages):
        here = f"{where}, message {place + 1}"
        if messages[place]["role"] != "assistant":
            raise UserError(f"{here}: the {messages[place]['role']} speaks where the assistant's turn is")
        own = _moves(here, messages[place], tools)
        calls = [move for move in own if move.call is not None and move.call.name != REFUSAL_TOOL]
        place += 1
        if calls:
            outputs = messages[place : place + len(calls)]
            is_last = place == len(messages) and len(calls) == 1
            if not is_last and [one["role"] for one in outputs] != ["tool"] * len(calls):
                raise UserError(f"{here}: {len(calls)} calls, and not as many tool messages right after them")
            following += [None] if is_last else _in_order(messages[place - 1], outputs)
            place += len(outputs)
        elif place < len(messages):
            if messages[place]["role"] != "user" or own[-1].call is not None:
                ended = "a refusal ends a conversation" if own[-1].call is not None else "nothing was called"
                role = messages[place]["role"]
                raise UserError(f"{where}, message {place + 1}: the {role} speaks after an answer: {ended}")
            following.append(str(messages[place]["content"]))
            place += 1
            if place == len(messages):
                raise UserError(f"{where}: the last message is the user's; it must be the assistant's")
        else:
            following.append(None)
        moves += own
    return moves, following


def _moves(where: str, message: Message, tools: Sequence[ToolSchema]) -> list[Move]:
    """The moves of one message: one a call, or its answer."""
    trained = message["weight"] == 1
    text = str(message.get("content") or "")
    turn = parse_turn(text, HERMES, tools=tools)
    if text.strip() and turn.action == "malformed" and not (turn.plan or turn.check):
        raise UserError(f"{where}: its tags or its call are not closed, or out of order: {text[:80]!r}")
    thought = next((str(message[name]) for name in _THOUGHTS if message.get(name)), None)
    plan, answer = turn.plan or thought, turn.answer
    calls = [_call(where, call, tools) for call in cast("Sequence[Message]", message.get("tool_calls") or ())]
    if turn.call is not None and not calls:
        calls = [_checked(where, turn.call, tools)]
    if not calls and isinstance(message.get("refusal"), str) and message["refusal"]:
        calls = [ToolCall(REFUSAL_TOOL, {"reason": message["refusal"]})]
    if calls:  # what is said beside a call says what is done next
        if len(calls) > 1 and any(call.name == REFUSAL_TOOL for call in calls):
            raise UserError(f"{where}: {REFUSAL_TOOL} is called beside another tool; a refusal stands alone")
        said = "\n".join(part.strip() for part in (plan, answer) if part and part.strip())
        found = [Move(call=call, trained=trained) for call in calls]
        return [replace(found[0], plan=said or None, check=turn.check or None), *found[1:]]
    if not answer:
        raise UserError(f"{where}: the assistant neither says nor calls anything")
    return [Move(plan=plan or None, check=turn.check or None, answer=answer, trained=trained)]


def _call(where: str, call: Message, tools: Sequence[ToolSchema]) -> ToolCall:
    function = cast("Mapping[str, JsonValue]", call["function"])
    arguments = function.get("arguments")
    return _checked(where, ToolCall(str(function["name"]), dict(cast(Message, arguments or {}))), tools)


def _checked(where: str, call: ToolCall, tools: Sequence[ToolSchema]) -> ToolCall:
    """The call. UserError where no tool has its name, or where the tool's schema refuses its arguments."""
    schema = REFUSAL_SCHEMA if call.name == REFUSAL_TOOL else find_schema(tools, call.name)
    if schema is None:
        there = ", ".join(shown(cast(Message, tool["function"])["name"]) for tool in tools) or "none"
        raise UserError(f"{where}: it calls {shown(call.name)}, and its tools are {there}")
    if (wrong := wrong_arguments(schema, call.arguments)) is not None:
        raise UserError(f"{where}: the schema of {shown(call.name)} refuses the call: {wrong}")
    return call


def _in_order(message: Message, outputs: Sequence[Message]) -> list[str]:
    """The outputs in the order of a message's calls, by their ids where all of them have one."""
    ids = [
        cast(Message, call).get("id") for call in cast("Sequence[JsonValue]", message.get("tool_calls") or ())
    ]
    named = {str(one.get("tool_call_id")): str(one.get("content") or "") for one in outputs}
    if len(named) == len(outputs) and {str(one) for one in ids} == set(named):
        return [named[str(one)] for one in ids]
    return [str(one.get("content") or "") for one in outputs]
