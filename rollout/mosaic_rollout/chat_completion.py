"""What is read of a server's chat completion. Keys that are not named here are passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, model_validator

from mosaic_rollout.plain_json import read_json


class CompletionFunction(BaseModel):
    name: str
    arguments: object = None  # JSON text of an object, or the object; anything else is malformed


class CompletionCall(BaseModel):
    """A tool call that the server parsed out of the text."""

    id: str | None = None
    function: CompletionFunction


_TEXTS = (None, "text", "output_text")
_THOUGHTS = ("thinking", "reasoning")


def _text(value: object) -> object:
    """A text, or that of a list of parts: thoughts and pictures among them are left out."""
    return _joined(value, _TEXTS) if isinstance(value, list) else value


def _thought(value: object) -> object:
    """A thought where it is told as text, or as a list of texts; else it is passed over."""
    return _joined(value, _TEXTS) if isinstance(value, list) else value if isinstance(value, str) else None


def _joined(parts: list[object], kinds: Sequence[str | None]) -> str | None:
    """The text of the parts of some kinds; None where there is none."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str) and None in kinds:
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") in kinds:
            told = (part.get(key) for key in ("text", *_THOUGHTS))
            texts += [text for text in map(_thought, told) if isinstance(text, str)]
    return "".join(texts) if texts else None


_Thought = Annotated[str | None, BeforeValidator(_thought)]


class CompletionMessage(BaseModel):
    content: Annotated[str | None, BeforeValidator(_text)] = None
    reasoning_content: _Thought = None
    reasoning: _Thought = None  # the same under vLLM's newer name
    tool_calls: list[CompletionCall] | None = None

    @model_validator(mode="before")
    @classmethod
    def _thought_of_parts(cls, value: object) -> object:
        """A thought that is a part of the content is told apart from it."""
        parts = value.get("content") if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and isinstance(parts, list) and not value.get("reasoning_content"):
            return {**value, "reasoning_content": _joined(parts, _THOUGHTS)}
        return value


class _Choice(BaseModel):
    message: CompletionMessage
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None


class ChatCompletion(BaseModel):
    """An answer; of several choices the first one counts."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None

    @property
    def message(self) -> CompletionMessage:
        return self.choices[0].message

    @property
    def cut_off(self) -> bool:
        """Whether it ran into its token limit."""
        return self.choices[0].finish_reason == "length"

    @property
    def prompt_tokens(self) -> int:
        """0 where the server reports no usage; completion_tokens likewise."""
        return (self.usage or _Usage()).prompt_tokens or 0

    @property
    def completion_tokens(self) -> int:
        return (self.usage or _Usage()).completion_tokens or 0


def read_completion(text: str) -> ChatCompletion:
    """The chat completion that a body holds. ValueError where it holds none."""
    return ChatCompletion.model_validate(read_json(text))
