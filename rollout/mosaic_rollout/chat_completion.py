"""What is read of a server's chat completion. Keys that are not named here are passed over."""

from __future__ import annotations

from pydantic import BaseModel, Field, NonNegativeInt

from mosaic_rollout.plain_json import read_json


class CompletionFunction(BaseModel):
    name: str
    arguments: str | dict[str, object] | None = None


class CompletionCall(BaseModel):
    """A tool call that the server parsed out of the text."""

    id: str | None = None
    function: CompletionFunction


class CompletionMessage(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same under vLLM's newer name
    tool_calls: list[CompletionCall] | None = None


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
