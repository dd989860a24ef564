"""OpenAI's chat-completions protocol as it is served: what a request may hold, and what errors look like.

A parameter that asks for something which is not done here is refused by name; one that says nothing of the
answer (`user`, `metadata`) is passed over, and null counts as left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from mosaic_rollout.plain_json import read_json
from mosaic_rollout.types import ToolSchema

PASSED_OVER: Final = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "reasoning_effort", "verbosity"),
)
"""Parameters of OpenAI's that change nothing here."""
NOT_DONE: Final[Mapping[str, object]] = {
    **{"top_logprobs": 0, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}},
    **{"response_format": {"type": "text"}, "modalities": ["text"], "audio": None, "prediction": None},
    **{"functions": [], "function_call": "none", "web_search_options": None},
}
"""Parameters that are refused -> the value with which they ask for nothing."""


class ApiError(Exception):
    """What a client is told: an HTTP status and an error in OpenAI's shape."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, object]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _function(found: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A tool's function as templates read it, in the client's order: what OpenAI lets out is there.

    `strict` is a promise of OpenAI's servers about sampling.
    """
    name, parameters = found.get("name"), found.get("parameters") or {}
    if not isinstance(name, str) or not name:
        raise ValueError("a function has a name")
    if not isinstance(parameters, dict):
        raise ValueError("parameters must be a JSON schema")
    kept = {key: value for key, value in found.items() if key != "strict"}
    kept.setdefault("description", "")
    left_out = {"type": "object", "properties": {}}
    kept["parameters"] = {**parameters, **{k: v for k, v in left_out.items() if k not in parameters}}
    return kept


class Tool(_Part):
    type: Literal["function"]
    function: Annotated[dict[str, JsonValue], AfterValidator(_function)]

    @property
    def name(self) -> str:
        return str(self.function["name"])


class _Named(_Part):
    name: str


class NamedTool(_Part):
    """A tool that must be called."""

    type: Literal["function"]
    function: _Named


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(_Part):
    """A request, checked. See OpenAI's API reference for the meaning of each parameter."""

    model: str
    messages: list[dict[str, JsonValue]] = Field(min_length=1)
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    n: int = Field(default=1, ge=1, le=128)
    seed: int | None = None
    stop: str | list[str] = []
    logprobs: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def shown_tools(self) -> list[ToolSchema]:
        """The schemas that the policy is shown."""
        if self.tool_choice == "none":
            return []
        return [{"type": "function", "function": tool.function} for tool in self.tools]

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text]

    def must_call(self, calls: list[str]) -> bool:
        """Whether these calls, by name, are what `tool_choice` asks for."""
        if isinstance(self.tool_choice, NamedTool):
            return bool(calls) and set(calls) == {self.tool_choice.function.name}
        return bool(calls) or self.tool_choice != "required"


def read_request(body: bytes) -> ChatRequest:
    """The request of a body. ApiError says what is wrong with it, and names the parameter."""
    try:
        asked = read_json(body.decode("utf-8"))
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(asked, dict):
        raise ApiError("the body must be a JSON object with model and messages")
    given = {name: value for name, value in asked.items() if value is not None and name not in PASSED_OVER}
    for name, nothing in NOT_DONE.items():
        if given.pop(name, nothing) != nothing:
            raise ApiError(
                f"{name} is not supported here; leave it out, or send {json.dumps(nothing)}",
                param=name,
                code="unsupported_parameter",
            )
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        param = ".".join(path) or None
        if first["type"] == "extra_forbidden" and len(path) == 1:
            raise ApiError(f"unknown parameter: {path[0]!r}", param=param, code="unknown_parameter") from None
        if first["type"] == "missing":
            raise ApiError(f"{param} is missing", param=param, code="missing_required_parameter") from None
        raise ApiError(f"{param}: {first['msg']}", param=param, code="invalid_value") from None
    names = [tool.name for tool in request.tools]
    choice = request.tool_choice
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise ApiError(
            f"tool_choice names {choice.function.name!r}, which is none of the tools", param="tool_choice"
        )
    if choice == "required" and not names:
        raise ApiError("tool_choice is 'required' and there are no tools", param="tool_choice")
    return request
