"""OpenAI messages in the one form that chat templates read, and as plain text for templates without tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from mosaic_rollout.chat.call_formats import HERMES, CallFormat
from mosaic_rollout.chat.grammar import TAGS
from mosaic_rollout.chat.reserved import mapped
from mosaic_rollout.errors import UserError
from mosaic_rollout.plain_json import without_surrogates
from mosaic_rollout.types import JsonValue, Message, ToolCall, ToolSchema

OUTPUT_OPEN, OUTPUT_CLOSE = "<tool_response>", "</tool_response>"
"""Around a tool's output where the template has no role for it, as Qwen's templates write it."""
_CALL_TAGS = ("<tool_call>", "</tool_call>")
LOOP_WORDS = (*TAGS, *_CALL_TAGS, OUTPUT_OPEN, OUTPUT_CLOSE)
OWN_WORDS = re.compile("|".join(map(re.escape, (*TAGS, *_CALL_TAGS))))
"""What an assistant's message may rightly hold: thoughts, a check, a call in the loop's own form."""
_SERVERS_WORDS = re.compile(
    r"<\|[^<>|\s]+\|>|<｜[^<>｜]+｜>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|"
    + "|".join(map(re.escape, LOOP_WORDS))
)
"""What steers models of the families, and the loop, where the tokenizer is a server's and not known."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_OF_NAMES = (
    "properties",
    "patternProperties",
    "dependentRequired",
    "dependentSchemas",
    "$defs",
    "definitions",
)
"""Keywords of JSON Schema whose values have names of the tool's own as keys."""
_OF_VALUES = ("default", "const", "enum", "examples", "example")
"""Keywords whose values are data throughout."""
_STRUCTURAL = ("role", "type")  # keys whose values are not data, where they are words of OpenAI's
_PLAIN_WORD = re.compile(r"\$?[A-Za-z_][\w-]*", re.ASCII)


def plain_message(message: Message) -> Message:
    """A message as templates read it: a text as content, calls as {"function": {"name", "arguments"}}.

    Parts of text are joined; content that is null counts as absent; arguments that are the JSON of an object
    become the object. UserError for another role than OpenAI's, and for content that is no text.
    """
    role = "tool" if message.get("role") == "function" else message.get("role")
    if role not in ROLES:
        raise UserError(f"a message has the role {role!r}; a conversation has {', '.join(ROLES)}")
    kept: Message = {name: value for name, value in message.items() if value is not None}
    kept["role"] = role
    if "content" in kept:
        kept["content"] = _content(kept["content"])
    calls = kept.pop("tool_calls", None)
    if isinstance(calls, Sequence) and not isinstance(calls, str) and calls:
        kept["tool_calls"] = [_plain_call(call) for call in calls]
    if "content" not in kept and "tool_calls" not in kept:
        kept["content"] = ""
    return kept


def changed_texts(message: Message, change: Callable[[str], str], own: Callable[[str], str]) -> Message:
    """A message with every text of it changed, but for its role; what an assistant says itself, by `own`."""
    spoken = ("content", "reasoning_content", "thinking", "reasoning")
    found: Message = {}
    for name, value in message.items():
        if name in _STRUCTURAL:
            found[name] = _changed_word(value, change)
        elif name in spoken and message["role"] == "assistant":
            found[name] = mapped(value, own)
        elif name == "tool_calls" and isinstance(value, Sequence):
            found[name] = [_changed_call(call, change) for call in value]
        else:
            found[name] = mapped(value, change)
    return found


def for_server(message: Message) -> Message:
    """A message for an endpoint, whose tokenizer may take such words in a text for its template's own.

    They are broken up by a space in all data, but for an assistant's own thoughts and calls.
    """
    return changed_texts(message, without_servers_words, _own_for_server)


def changed_tool(tool: ToolSchema, change: Callable[[str], str]) -> ToolSchema:
    """A tool's schema with every text of it changed, names of arguments as well, but JSON Schema's words.

    A keyword or a type that is no plain word is not one of JSON Schema's.
    """
    return {_keyword(name, change): _changed_schema(value, change, name) for name, value in tool.items()}


def _changed_schema(value: JsonValue, change: Callable[[str], str], keyword: str) -> JsonValue:
    """What a schema has under one of its keywords."""
    if keyword == "type":
        return _changed_word(value, change)
    if isinstance(value, Mapping):
        if keyword in _OF_VALUES:
            return mapped(value, change)
        names_follow = keyword in _OF_NAMES
        return {
            (change(name) if names_follow else _keyword(name, change)): _changed_schema(
                inner, change, "" if names_follow else name
            )
            for name, inner in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        if keyword in _OF_VALUES:
            return mapped(value, change)
        return [_changed_schema(inner, change, "") for inner in value]
    return mapped(value, change)


def _keyword(name: str, change: Callable[[str], str]) -> str:
    return name if _PLAIN_WORD.fullmatch(name) else change(name)


def _changed_word(value: JsonValue, change: Callable[[str], str]) -> JsonValue:
    """A word of a format, or a list of them, as it is; anything else that stands in its place is data."""
    return mapped(value, lambda text: _keyword(text, change))


def written_tools(tools: Sequence[ToolSchema]) -> str:
    """Schemas as text, one a line."""
    return "\n".join(_json(tool.get("function", tool), separators=(",", ":")) for tool in tools)


def new_tools_text(tools: Sequence[ToolSchema]) -> str:
    """What is written below a message that brings further tools."""
    return f"\n\nFurther tools from here on:\n{written_tools(tools)}" if tools else ""


def with_written_calls(message: Message, call_format: CallFormat = HERMES) -> Message:
    """A message whose tool calls are part of its text, in a format; by default that of call_format_v1.md."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    message = plain_message(message)
    calls, text = message.pop("tool_calls", []), str(message.get("content") or "")
    for call in calls if isinstance(calls, list) else []:
        function = call["function"] if isinstance(call, dict) else {}
        if isinstance(function, dict):
            text += f"\n{_written(function, call_format)}"
    return {**message, "content": text}


def _written(function: Mapping[str, JsonValue], call_format: CallFormat) -> str:
    name, arguments = function["name"], function["arguments"]
    if call_format is HERMES or not isinstance(arguments, dict):  # arguments that are no object stay as given
        body = _json({"name": name, "arguments": arguments})
        return f"{HERMES.marker}{body}</tool_call>"
    return call_format.write(ToolCall(str(name), arguments))


def with_written_output(message: Message) -> Message:
    """A tool's message as a user's."""
    if message["role"] != "tool":
        return message
    return {"role": "user", "content": f"{OUTPUT_OPEN}\n{message.get('content') or ''}\n{OUTPUT_CLOSE}"}


def with_system(messages: Sequence[Message], parts: Sequence[str]) -> list[Message]:
    """The messages with `parts` joined to the system message, which is made where there is none."""
    if not parts:
        return list(messages)
    if messages and messages[0]["role"] == "system":
        text = "\n\n".join([str(messages[0].get("content") or ""), *parts])
        return [{"role": "system", "content": text}, *messages[1:]]
    return [{"role": "system", "content": "\n\n".join(parts)}, *messages]


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with what the system says at the head of the user's next message."""
    found: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] in ("system", "developer"):
            waiting.append(str(message.get("content") or ""))
            continue
        if waiting and message["role"] == "user":
            message = {**message, "content": "\n\n".join([*waiting, str(message.get("content") or "")])}
            waiting = []
        elif waiting:
            found.append({"role": "user", "content": "\n\n".join(waiting)})
            waiting = []
        found.append(message)
    if waiting:
        found.append({"role": "user", "content": "\n\n".join(waiting)})
    return found


def with_turns_joined(messages: Sequence[Message]) -> list[Message]:
    """The messages with those that one side says in a row made one, for templates that take no two."""
    found: list[Message] = []
    for message in messages:
        last = found[-1] if found else None
        joins = (
            last is not None and last["role"] == message["role"] and message["role"] in ("user", "assistant")
        )
        if last is None or not joins or "tool_calls" in last or "tool_calls" in message:
            found.append(message)
        else:
            texts = (str(last.get("content") or ""), str(message.get("content") or ""))
            found[-1] = {**last, "content": "\n\n".join(filter(None, texts))}
    return found


def without_servers_words(text: str) -> str:
    """A text with a space in every word that steers models."""
    while _SERVERS_WORDS.search(text):
        text = _SERVERS_WORDS.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", text)
    return text


def _own_for_server(text: str) -> str:
    parts = re.split(f"({OWN_WORDS.pattern})", text)
    return "".join(part if i % 2 else without_servers_words(part) for i, part in enumerate(parts))


def _content(content: JsonValue) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"the content of a message has a part of type {kind!r}; only text can be read")
        texts.append(text)
    return "".join(texts)


def _plain_call(call: JsonValue) -> JsonValue:
    """A call as OpenAI writes one, its arguments an object where their text is one's JSON."""
    if not isinstance(call, Mapping):
        raise UserError(f"a message's tool_calls hold {call!r}; a call is an object with a function in it")
    function = call.get("function", {key: call[key] for key in ("name", "arguments") if key in call})
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError('a call in a message must be {"function": {"name", "arguments"}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    outer = {
        name: value for name, value in call.items() if name not in ("name", "arguments") and value is not None
    }
    return {"type": "function", **outer, "function": {**function, "arguments": arguments or {}}}


def _changed_call(call: JsonValue, change: Callable[[str], str]) -> JsonValue:
    if not isinstance(call, Mapping):
        return call
    return {
        name: _changed_word(value, change)
        if name in _STRUCTURAL
        else {key: mapped(inner, change) for key, inner in value.items()}
        if name == "function" and isinstance(value, Mapping)
        else mapped(value, change)
        for name, value in call.items()
    }


def _json(value: object, separators: tuple[str, str] | None = None) -> str:
    """JSON as templates write it: other letters than ASCII's as they are."""
    return without_surrogates(json.dumps(value, ensure_ascii=False, separators=separators))
