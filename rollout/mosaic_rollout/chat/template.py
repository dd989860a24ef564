"""A tokenizer's chat template, and what it writes by itself: seen in conversations of ours that it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from itertools import product
from typing import Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from mosaic_rollout.chat.call_formats import FORMATS, HERMES, CallFormat, format_of_template
from mosaic_rollout.chat.messages import written_tools
from mosaic_rollout.chat.prompts import load_prompt
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, Message, ToolCall, ToolSchema

MARK = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜]+｜>|</?[A-Za-z][\w:.-]*>|<</?[A-Z]+>>|\[/?[A-Z][A-Z_]+\]")
"""How families write the marks of a conversation."""
TurnKind = Literal["call", "answer"]

_TOOL, _KEY, _VALUE = "mosaicprobe", "mosaickey", "mosaicvalue"
_SYSTEM, _USER, _NEXT = "mosaicsystem", "mosaicuser", "mosaicnext"
_DATE = "mosaicdate"
PROBE_TOOL: ToolSchema = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "probe"}},
            "required": [_KEY],
        },
    },
}
USER: Message = {"role": "user", "content": _USER}
_CALL_IDS = ("call", "call00000")  # some templates want one of nine letters and digits


@dataclass(frozen=True)
class Support:
    """What a template writes by itself, where tools are given to it or where none are."""

    with_tools: bool
    knows_tools: bool = False  # the template writes schemas where it is given some
    tools: bool = False  # some are given, and written
    system: bool = False
    developer: bool = False
    calls: bool = False  # of an assistant's message, from its tool_calls
    outputs: bool = False  # messages of the role tool
    outputs_follow: TurnKind = "answer"  # what stands before an output when an observation is rendered
    takes_turns: bool = False  # two messages of the user's in a row are refused
    call_id: str = _CALL_IDS[0]
    text_arguments: bool = False  # a call's arguments are wanted as JSON text, not as an object
    empty_content: bool = False  # a message that only calls is given empty content; else it has none
    taught: CallFormat = HERMES  # what the loop writes calls in, where the template does not

    def answer(self, text: str) -> Message:
        return {"role": "assistant", "content": text}

    def call(self, name: str, value: str) -> Message:
        """An assistant's message with one call."""
        return self.prepared({"role": "assistant", "tool_calls": [_call(self.call_id, name, {_KEY: value})]})

    def turn(self, said: str, call: ToolCall | None) -> Message:
        """An assistant's message that says something, and makes a call where there is one."""
        if call is None:
            return self.answer(said)
        calls = [_call(self.call_id, call.name, call.arguments)]
        return self.prepared({"role": "assistant", "content": said, "tool_calls": calls})

    def output(self, name: str, text: str) -> Message:
        return self.prepared({"role": "tool", "name": name, "content": text})

    def written_schemas(self, tools: Sequence[ToolSchema]) -> list[str]:
        """What the system message says of tools: nothing where the template writes them."""
        if self.knows_tools:
            return []
        if self.taught is HERMES:
            return [load_prompt("call_format_v1").format(tools=written_tools(tools))]
        example = self.taught.write(ToolCall("tool name", {"argument": "value"}))
        text = load_prompt("call_format_of_model_v1")
        return [text.format(tools=written_tools(tools), example=example)]

    def prepared(self, message: Message) -> Message:
        """A message with calls or an output, in the form that this template takes them in."""
        calls = message.get("tool_calls")
        if message["role"] == "tool":
            return {"tool_call_id": self.call_id, **message}
        if not isinstance(calls, list):
            return message
        found: Message = {**message, "tool_calls": [_as_wanted(call, self.text_arguments) for call in calls]}
        if self.empty_content and "content" not in found:
            found["content"] = ""
        return found


class Template:
    """The chat template of a tokenizer, on the date that the run has.

    today: what `strftime_now` tells, and `date_string` where the template writes nothing without it.
    call_format: the one in which calls are written, by the template or else by the loop; None: whichever of
        ours the template writes, or else Hermes'.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, today: date, call_format: CallFormat | None = None
    ) -> None:
        self._formats = FORMATS if call_format is None else (call_format,)
        self.taught = call_format or HERMES
        self._tokenizer, self._name = tokenizer, str(tokenizer.name_or_path)
        self._now = datetime.combine(today, time())
        self._variables: dict[str, object] = {
            **tokenizer.special_tokens_map,
            "strftime_now": self._now.strftime,
            "documents": None,
        }
        self._variables |= self._date_string()
        self.call_format = self._call_format()

    def render(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] | None, *, opens: bool = False
    ) -> str:
        """The text of a conversation; `opens`: up to where the assistant's next turn begins.

        It is what `apply_chat_template` gives, less its copies of everything and with a date of ours:
        messages and schemas must be JSON values, none of them null in a message.
        """
        given = list(tools) if tools else None
        try:
            template = self._tokenizer.get_chat_template(tools=given)
            text = _compile_jinja_template(template).render(
                messages=list(messages), tools=given, add_generation_prompt=opens, **self._variables
            )
        except Exception as error:  # a template is a program, though confined to a sandbox
            raise UserError(
                f"the chat template of {self._name!r} fails on a conversation of "
                f"{', '.join(str(message['role']) for message in messages)}: {type(error).__name__}: {error}"
            ) from error
        return str(text)

    def support(self, *, with_tools: bool) -> Support:
        """What the template writes, with tools given to it or without.

        Tools and calls are the template's to write where it writes both, the calls in a form that is read;
        else the loop writes them, and teaches a form.
        """
        knows_tools = self.call_format is not None
        tools = [PROBE_TOOL] if knows_tools and with_tools else None
        found = Support(
            with_tools=with_tools,
            taught=self.taught,
            knows_tools=knows_tools,
            tools=knows_tools and with_tools,
            system=self._writes([{"role": "system", "content": _SYSTEM}, USER], tools, _SYSTEM),
            developer=self._writes([{"role": "developer", "content": _SYSTEM}, USER], tools, _SYSTEM),
            takes_turns=not self._writes([USER, USER], tools, _USER),
        )
        if knows_tools:
            found = self._with_calls(found, tools)
        for calls in (True, False) if found.calls else (False,):
            turn = found.call(_TOOL, _VALUE) if calls else found.answer(_VALUE)
            kind: TurnKind = "call" if calls else "answer"
            if self._writes([USER, turn, found.output(_TOOL, _NEXT)], tools, _VALUE, _NEXT):
                return replace(found, outputs=True, outputs_follow=kind)
        turn = found.call(_TOOL, _VALUE) if found.calls else None
        after_call = turn is not None and self._writes(
            [USER, turn, {"role": "user", "content": _NEXT}], tools, _VALUE, _NEXT
        )
        return replace(found, outputs_follow="call" if after_call else "answer")

    def marks(self, *supports: Support) -> set[str]:
        """The marks that the template writes around what it is given."""
        texts = []
        for support in supports:
            tools = [PROBE_TOOL] if support.tools else None
            call = [support.call(_TOOL, _VALUE)] if support.calls else []
            output = [support.output(_TOOL, _NEXT)] if support.outputs else []
            for messages in ([USER], [USER, support.answer(_VALUE), USER], [USER, *call, *output]):
                with suppress(UserError):  # those that are played are tried elsewhere
                    texts.append(self.render(messages, tools, opens=True))
        return {word for text in texts for word in MARK.findall(text) if "mosaic" not in word}

    def _call_format(self) -> CallFormat | None:
        """The format in which the template writes calls, where it writes tools and the format is read."""
        if not self._writes([USER], [PROBE_TOOL], _TOOL):
            return None
        support = self._with_calls(Support(with_tools=True, knows_tools=True, tools=True), [PROBE_TOOL])
        if not support.calls:
            return None

        def written(call: ToolCall) -> Sequence[Message]:
            calls: JsonValue = [_call(support.call_id, call.name, call.arguments)]
            message = support.prepared({"role": "assistant", "tool_calls": calls})
            if self._writes([USER, message], [PROBE_TOOL], call.name):
                return [message]
            return [message, support.output(call.name, _NEXT)]  # some take no call without its output

        endings = list(map(str, self._tokenizer.all_special_tokens))
        return format_of_template(self.render, written, endings, self._formats)

    def _with_calls(self, found: Support, tools: Sequence[ToolSchema] | None) -> Support:
        """With the form in which the template takes a call; the same where it writes none."""
        fallback = found
        for as_text, call_id, empty in product((False, True), _CALL_IDS, (False, True)):
            tried = replace(found, calls=True, text_arguments=as_text, call_id=call_id, empty_content=empty)
            # Where the template refuses a call without its output, the output is there.
            for after in ([], [tried.output(_TOOL, _NEXT)]):
                try:
                    text = self.render([USER, tried.call(_TOOL, _VALUE), *after], tools)
                except UserError:
                    continue
                if _VALUE in text and f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text:
                    return tried
                if _VALUE in text and not fallback.calls:
                    fallback = tried
        return fallback

    def _writes(self, messages: Sequence[Message], tools: Sequence[ToolSchema] | None, *texts: str) -> bool:
        """Whether the template takes a conversation and writes these texts of it."""
        try:
            rendered = self.render(messages, tools, opens=True)
        except UserError:
            return False
        return all(text in rendered for text in texts)

    def _date_string(self) -> dict[str, object]:
        """`date_string`, as Llama's templates name it, where the template has no date without it."""
        found: dict[str, object] = {}
        for tools in (None, [PROBE_TOOL]):
            try:
                plain = self.render([USER], tools)
                self._variables["date_string"] = _DATE
                dated = self.render([USER], tools)
            except UserError:  # named where the conversation is wanted
                continue
            finally:
                self._variables.pop("date_string", None)
            if _DATE in dated and dated.replace(_DATE, "") == plain:
                found["date_string"] = self._now.strftime("%d %b %Y")
        return found


def _call(call_id: str, name: str, arguments: JsonValue) -> JsonValue:
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}


def _as_wanted(call: JsonValue, text_arguments: bool) -> JsonValue:
    """A call with its arguments as an object or as its JSON, as the template wants them."""
    function = call.get("function") if isinstance(call, dict) else None
    if not text_arguments or not isinstance(call, dict) or not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
