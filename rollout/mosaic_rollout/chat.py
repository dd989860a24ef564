"""Between messages and token ids: a model's own chat template, used once a prompt and once an observation.

What the policy sampled is never rendered again. An observation's tokens are what the template writes after an
assistant message, so the ids of a rollout are those of one uninterrupted conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from mosaic_rollout.call_formats import HERMES, CallFormat, detect_call_format
from mosaic_rollout.errors import UserError
from mosaic_rollout.grammar import SAFETY_OPEN, THINK_CLOSE, THINK_OPEN
from mosaic_rollout.plain_json import without_surrogates
from mosaic_rollout.prompts import load_prompt
from mosaic_rollout.types import Message, ToolSchema

_SENTINEL = "mosaicsentinel"
_OUTPUT_OPEN, _OUTPUT_CLOSE = "<tool_response>", "</tool_response>"
"""Around a tool's output where the template has no role for it, as Qwen's templates write it."""
_KEPT_ENCODINGS = 512  # texts
_PROBE_TOOL: ToolSchema = {
    "type": "function",
    "function": {
        "name": "mosaicprobe",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}


class Chat:
    """A tokenizer with a chat template, made to speak the plan-check-act loop.

    teach_loop: write the text that teaches the loop (prompts/loop_v1.md) into the system message. A model
    that learnt the loop in training, as the embedded one, does without.
    end_token_ids: further tokens that end a turn, as the model's folder names them (generation_config.json).

    Raises UserError where the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, teach_loop: bool, end_token_ids: Sequence[int] = ()
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruct model, "
                "or put a chat_template.jinja file beside tokenizer.json"
            )
        self.tokenizer = tokenizer
        self._teach_loop = teach_loop
        user: Message = {"role": "user", "content": "x"}
        with_tools = self._render([user], [_PROBE_TOOL])
        self._template_has_tools = "mosaicprobe" in with_tools
        self.call_format = self._detect_call_format()
        closed = self._render([user, {"role": "assistant", "content": _SENTINEL}], None)
        self._turn_end = closed.rpartition(_SENTINEL)[2].strip()
        turn_end_ids = tokenizer.encode(self._turn_end, add_special_tokens=False)[:1]
        if not turn_end_ids:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path!r} does not mark where a turn ends"
            )
        self._turn_end = str(tokenizer.decode(turn_end_ids))
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stop = [*turn_end_ids, *eos, *end_token_ids]
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys(stop))
        self._template_has_outputs = self._detect_outputs()
        reserved = {_OUTPUT_OPEN, _OUTPUT_CLOSE, *map(str, tokenizer.get_added_vocab())}
        # Siblings of a group have a prompt in common, and tools often say the same.
        self._encode = lru_cache(maxsize=_KEPT_ENCODINGS)(self._encode_anew)
        self._reserved = re.compile("|".join(map(re.escape, sorted(reserved, key=len, reverse=True))))

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> tuple[np.ndarray, bool]:
        """Token ids [L] int64 of the opening messages, ready for the policy's first turn.

        Also says whether the prompt ends inside an opened `<think>`.
        """
        parts = [load_prompt("loop_v1")] if self._teach_loop else []
        if not self._template_has_tools:
            parts.append(load_prompt("call_format_v1").format(tools=written_tools(tools)))
            messages = [with_written_calls(message) for message in messages]
        if not self._template_has_outputs:
            messages = [with_written_output(message) for message in messages]
        template_tools = tools if self._template_has_tools else None
        text = self._render(_with_system(messages, parts), template_tools, opens=True)
        return self._encode(text), text.rstrip().endswith(THINK_OPEN)

    def observation(self, content: str, tool_name: str) -> tuple[np.ndarray, bool]:
        """Token ids [L] int64 from the end of the policy's turn to the start of its next one.

        A template that leaves tool messages out (Phi-4's) gets the output as a user's, between tags.
        """
        return self._continuation({"role": "tool", "name": tool_name, "tool_call_id": "call"}, content)

    def user_message(self, content: str) -> tuple[np.ndarray, bool]:
        """Token ids [L] int64 from the end of the policy's answer to the start of its next turn.

        They follow the tokens as they were sampled. Templates that leave earlier thoughts out once the user
        speaks again (Qwen3's) are not followed in that: it would be another conversation than was sampled.
        """
        return self._continuation({"role": "user"}, content)

    def _continuation(self, head: Message, content: str) -> tuple[np.ndarray, bool]:
        """What the template writes after an assistant's turn for a message of `content`."""
        # A tool's output must not be able to end its own message.
        content = self._reserved.sub(lambda match: match.group()[0] + " " + match.group()[1:], content)
        message: Message = {**head, "content": content}
        if not self._template_has_outputs:
            message = with_written_output(message)
        turn: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SENTINEL}]
        text = self._render([*turn, message], None, opens=True)
        text = text.rpartition(_SENTINEL)[2].removeprefix(self._turn_end)
        return self._encode(text), text.rstrip().endswith(THINK_OPEN)

    @property
    def check_tag(self) -> tuple[int, ...]:
        """The token ids that open a check right after a plan, in the form in which the loop is taught."""
        separator = "\n" if self._teach_loop else ""
        before = self._encode(THINK_CLOSE)
        return tuple(self._encode(f"{THINK_CLOSE}{separator}{SAFETY_OPEN}")[len(before) :].tolist())

    def turn_text(self, token_ids: Sequence[int]) -> str:
        """The text of sampled tokens [N], the stop token left out, all other special tokens kept."""
        if len(token_ids) and token_ids[-1] in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return self.decode(token_ids)

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        text = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    def tokens_through(self, token_ids: Sequence[int], end: int) -> int:
        """How many of the sampled tokens [N] it takes to write the first `end` characters of their text."""
        low, high = 0, len(token_ids)
        while low < high:
            middle = (low + high) // 2
            if len(self.decode(token_ids[:middle])) >= end:
                high = middle
            else:
                low = middle + 1
        return low

    def _encode_anew(self, text: str) -> np.ndarray:  # [L] int64, read only
        ids = self.tokenizer.encode(without_surrogates(text), add_special_tokens=False)
        found = np.asarray(ids, np.int64)
        found.flags.writeable = False
        return found

    def _render(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] | None, *, opens: bool = False
    ) -> str:
        conversation = cast("list[dict[str, str]]", list(messages))  # the annotation upstream is too narrow
        try:
            text = self.tokenizer.apply_chat_template(
                conversation,
                tools=list(tools) if tools else None,
                add_generation_prompt=opens,
                tokenize=False,
            )
        except Exception as error:  # a template is a program, though confined to a sandbox
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path!r} fails on a conversation of "
                f"{', '.join(str(message['role']) for message in messages)}: {type(error).__name__}: {error}"
            ) from error
        return str(text)

    def _detect_outputs(self) -> bool:
        """Whether the template writes what a tool returned; some know no such role, or refuse it."""
        output: Message = {
            "role": "tool",
            "name": "mosaicprobe",
            "tool_call_id": "call",
            "content": _SENTINEL,
        }
        turn: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        try:
            return _SENTINEL in self._render([*turn, output], None, opens=True)
        except UserError:
            return False

    def _detect_call_format(self) -> CallFormat:
        if not self._template_has_tools:
            return HERMES
        call = {
            "type": "function",
            "id": "call",
            "function": {"name": "mosaicprobe", "arguments": {"x": "y"}},
        }
        assistant: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        rendered = self._render([{"role": "user", "content": "x"}, assistant], [_PROBE_TOOL])
        without = self._render([{"role": "user", "content": "x"}], [_PROBE_TOOL])
        return detect_call_format(rendered.removeprefix(without))


def new_tools_text(tools: Sequence[ToolSchema]) -> str:
    """What is written below a message that brings further tools."""
    return f"\n\nFurther tools from here on:\n{written_tools(tools)}" if tools else ""


def written_tools(tools: Sequence[ToolSchema]) -> str:
    """Schemas as text, one a line."""
    return "\n".join(json.dumps(tool["function"], separators=(",", ":")) for tool in tools)


def with_written_calls(message: Message) -> Message:
    """A message whose tool calls are part of its text, in the format of prompts/call_format_v1.md."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    text = str(message.get("content") or "")
    for call in calls:
        function = call["function"] if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function["arguments"]
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
            body = json.dumps({"name": function["name"], "arguments": parsed})
            text += f"\n{HERMES.marker}{body}</tool_call>"
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}


def with_written_output(message: Message) -> Message:
    """A tool's message as a user's."""
    if message["role"] != "tool":
        return message
    return {"role": "user", "content": f"{_OUTPUT_OPEN}\n{message['content']}\n{_OUTPUT_CLOSE}"}


def _with_system(messages: Sequence[Message], parts: Sequence[str]) -> list[Message]:
    """The messages with `parts` joined to the system message, which is made where there is none."""
    if not parts:
        return list(messages)
    if messages and messages[0]["role"] == "system":
        text = "\n\n".join([str(messages[0]["content"]), *parts])
        return [{"role": "system", "content": text}, *messages[1:]]
    return [{"role": "system", "content": "\n\n".join(parts)}, *messages]
