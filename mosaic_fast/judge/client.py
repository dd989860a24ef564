"""One OpenAI-compatible endpoint: an answer of a given shape, or a clear stop. Never a default answer."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import httpx
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from mosaic_fast.errors import TrainingError
from mosaic_rollout.no_cookies import no_cookies
from mosaic_rollout.plain_json import read_json

_CONNECT_S = 10.0
_LONGEST_WAIT_S = 60.0  # between two tries
_BODY_SHOWN = 300  # characters of a server's complaint

Answer = TypeVar("Answer")
Shape = TypeVar("Shape", bound=BaseModel)


class _TryAgain(Exception):
    """This try failed in a way that the next may not. `wait_s`: what the server asked for."""

    def __init__(self, what: str, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Reply(Generic[Answer]):
    """A valid answer, its text as it came, and what it took."""

    answer: Answer
    text: str
    tries: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. `api_key` is sent as a header and appears in no message of this program."""

    url: str
    model: str
    api_key: str | None
    temperature: float
    max_tokens: int
    timeout_s: float
    retries: int
    backoff_s: float = 1.0
    option: Callable[[str], str] = "judge.{}".format  # how the user writes a setting
    after_failure: str = (
        "No preference was made up; answers so far are in the cache and the last checkpoint is intact: mend "
        "the endpoint and go on with --resume"
    )
    after_limit: str = "; raise it for a new run, or go on with --resume, which starts counting anew"

    def open(self) -> httpx.AsyncClient:
        """A client to ask with. TrainingError for a key that no header can carry."""
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise TrainingError(
                "judge.api_key_env: the key in that environment variable has characters that no HTTP header "
                "can carry"
            )
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx.Timeout(self.timeout_s, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, cookies=no_cookies())

    async def ask(
        self,
        http: httpx.AsyncClient,
        messages: Sequence[dict[str, str]],
        shape: type[Shape],
        before_try: Callable[[], None],
    ) -> Reply[Shape]:
        """A valid JSON answer within `retries` + 1 tries; `before_try` is called before each, may refuse it.

        Tried again: no connection, silence, 408, 409, 429, 5xx, an answer cut short or of another shape.
        TrainingError at once for any other refusal of the server, and after the last try.
        """
        schema = {"name": shape.__name__, "strict": True, "schema": shape.model_json_schema()}
        form = {"response_format": {"type": "json_schema", "json_schema": schema}}

        def read(text: str) -> Shape:
            try:
                return shape.model_validate_json(text)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"]) or "the answer"
                raise ValueError(f"{where}: {first['msg']}") from None

        return await self._tries(http, self._body(messages, form), read, before_try)

    async def ask_text(
        self,
        http: httpx.AsyncClient,
        messages: Sequence[dict[str, str]],
        pattern: str,
        before_try: Callable[[], None],
    ) -> Reply[str]:
        """An answer in plain text that matches `pattern` as a whole, any case; else as `ask`."""

        def read(text: str) -> str:
            if not fits(pattern, text):
                raise ValueError(f"the answer must be of the form {pattern}")
            return text

        return await self._tries(http, self._body(messages, {}), read, before_try)

    async def _tries(
        self,
        http: httpx.AsyncClient,
        body: Mapping[str, object],
        read: Callable[[str], Answer],
        before_try: Callable[[], None],
    ) -> Reply[Answer]:
        reason = ""
        for attempt in range(self.retries + 1):
            before_try()
            try:
                async with asyncio.timeout(self.timeout_s):
                    response = await http.post(self._address, json=body)
                return self._read(response, read, attempt + 1)
            except _TryAgain as failure:
                reason, asked_s = str(failure), failure.wait_s
            except TimeoutError:
                reason, asked_s = f"no answer within {self.option('timeout_s')} = {self.timeout_s:g}", 0.0
            except httpx.RequestError as error:  # a broken compression or a redirect among them
                reason, asked_s = f"{type(error).__name__}: {error}", 0.0
            if attempt < self.retries:
                wait = (
                    self.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
                )  # apart, so that all do not return at once
                await asyncio.sleep(min(max(wait, asked_s), _LONGEST_WAIT_S))
        raise TrainingError(
            f"the judge at {self.url} gave no valid answer in {self.retries + 1} tries; the last: "
            f"{self._hide(reason)}. {self.after_failure}"
        )

    @property
    def _address(self) -> str:
        return self.url.rstrip("/") + "/chat/completions"

    def _body(self, messages: Sequence[dict[str, str]], form: Mapping[str, object]) -> dict[str, object]:
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **form,
        }

    def _read(self, response: httpx.Response, read: Callable[[str], Answer], tries: int) -> Reply[Answer]:
        said = self._hide(response.text)  # before it is cut: half a key is not hidden
        shown = said[:_BODY_SHOWN]
        if response.status_code in (408, 409, 429) or response.status_code >= 500:
            raise _TryAgain(f"HTTP {response.status_code} {shown}", _retry_after(response))
        if response.status_code != 200:
            endpoint, model, key = map(self.option, ("endpoint", "model", "api_key_env"))
            raise TrainingError(
                f"the judge at {self.url} refuses: HTTP {response.status_code} {shown}. Check {endpoint}, "
                f"{model} and {key}. {self.after_failure}"
            )
        try:
            completion = _Completion.model_validate(read_json(said))
        except ValueError:  # pydantic's own is one
            raise _TryAgain(f"not a chat completion: {shown!r}") from None
        choice, usage = completion.choices[0], completion.usage or _Usage()
        if choice.finish_reason == "length":
            raise _TryAgain(f"the answer was cut off at {self.option('max_tokens')} = {self.max_tokens}")
        content = choice.message.content
        if content is None:
            raise _TryAgain(f"an answer without text: {shown!r}")
        text = content.rpartition("</think>")[2].strip()  # a reasoning model may think aloud first
        try:
            answer = read(text)
        except ValueError as error:
            raise _TryAgain(f"{error} in {text[:_BODY_SHOWN]!r}") from None
        return Reply(answer, text, tries, usage.prompt_tokens or 0, usage.completion_tokens or 0)

    def _hide(self, text: str) -> str:
        return text.replace(self.api_key, "***") if self.api_key else text


def fits(pattern: str, text: str) -> bool:
    """Whether a text matches a regular expression as a whole, in any case and over lines."""
    return re.fullmatch(pattern, text, re.IGNORECASE | re.DOTALL) is not None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: NonNegativeInt | None = None
    completion_tokens: NonNegativeInt | None = None


class _Completion(BaseModel):
    """What is read of a chat completion."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


def _retry_after(response: httpx.Response) -> float:
    """Seconds a server asks to wait; dates and nonsense count as none."""
    try:
        return max(0.0, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
