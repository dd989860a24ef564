"""One OpenAI-compatible endpoint: an answer of a given shape, or a clear stop. Never a default answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import httpx
from pydantic import BaseModel

from mosaic_fast.errors import TrainingError
from mosaic_fast.preferences.answer import read_answer, read_text
from mosaic_rollout.endpoint.server import SHOWN_CHARS, ChatCompletion, ChatServer, NoAnswer, TryAgain

Answer = TypeVar("Answer")
Shape = TypeVar("Shape", bound=BaseModel)


@dataclass(frozen=True)
class Reply(Generic[Answer]):
    """A valid answer, its text as it came, and what it took."""

    answer: Answer
    text: str
    tries: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Endpoint(ChatServer):
    """Where and how to ask."""

    max_tokens: int
    option: Callable[[str], str] = "judge.{}".format
    after_failure: str = (
        "No preference was made up; answers so far are in the cache and the last checkpoint is intact: mend "
        "the endpoint and go on with --resume"
    )
    after_limit: str = "; raise it for a new run, or go on with --resume, which starts counting anew"

    async def ask(
        self,
        http: httpx.AsyncClient,
        messages: Sequence[dict[str, str]],
        shape: type[Shape],
        before_try: Callable[[], None],
    ) -> Reply[Shape]:
        """A valid JSON answer; `before_try` is called before each try, and may refuse it.

        Tried again, beside what ChatServer does: an answer cut short or of another shape.
        TrainingError at once for a refusal of the server, and after the last try.
        """

        def read(text: str) -> Shape:
            return read_answer(text, shape, quotable=messages[-1]["content"])

        return await self._answer(http, messages, _form(shape), read, before_try)

    async def ask_text(
        self,
        http: httpx.AsyncClient,
        messages: Sequence[dict[str, str]],
        pattern: str,
        before_try: Callable[[], None],
    ) -> Reply[str]:
        """An answer in plain text that matches `pattern` as a whole, any case; else as `ask`."""

        def read(whole: str) -> str:
            text = read_text(whole)
            if not fits(pattern, text):
                raise ValueError(f"the answer must be of the form {pattern}")
            return text

        return await self._answer(http, messages, {}, read, before_try)

    def asked_with(self, shape: type[BaseModel]) -> dict[str, object]:
        """The parameters of a request, as this server takes them; of a schema its name alone."""
        asked = {"temperature": self.temperature, "max_tokens": self.max_tokens, **_form(shape)}
        sent = self.parameters.sent(asked)
        form = sent.get("response_format")
        return sent | ({"response_format": form["type"]} if isinstance(form, dict) else {})

    async def _answer(
        self,
        http: httpx.AsyncClient,
        messages: Sequence[dict[str, str]],
        form: Mapping[str, object],
        read: Callable[[str], Answer],
        before_try: Callable[[], None],
    ) -> Reply[Answer]:
        asked = {"messages": list(messages), "max_tokens": self.max_tokens, **form}
        try:
            (answer, text, used), tries = await self.post(
                http, asked, lambda response: self._read(response, read), before_try
            )
        except NoAnswer as failure:
            raise TrainingError(
                f"the judge at {self.url} gave no valid answer in {self.retries + 1} tries; the last: "
                f"{failure}. {self.after_failure}"
            ) from None
        return Reply(answer, text, tries, used.prompt_tokens, used.completion_tokens)

    def _read(
        self, response: httpx.Response, read: Callable[[str], Answer]
    ) -> tuple[Answer, str, ChatCompletion]:
        shown = self.shown(response)
        if response.status_code != 200:
            endpoint, model, key = map(self.option, ("endpoint", "model", "api_key_env"))
            raise TrainingError(
                f"the judge at {self.url} refuses: HTTP {response.status_code} {shown}. Check {endpoint}, "
                f"{model} and {key}. {self.after_failure}"
            )
        completion = self.completion(response, self.hide(response.text))  # what is kept has no key in it
        if completion.cut_off:
            raise TryAgain(f"the answer was cut off at {self.option('max_tokens')} = {self.max_tokens}")
        if completion.message.content is None:
            raise TryAgain(f"an answer without text: {shown!r}")
        text = completion.message.content.strip()
        try:
            answer = read(text)
        except ValueError as error:
            raise TryAgain(f"{error} in {text[:SHOWN_CHARS]!r}") from None
        return answer, text, completion


def _form(shape: type[BaseModel]) -> dict[str, object]:
    schema = {"name": shape.__name__, "strict": True, "schema": shape.model_json_schema()}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def fits(pattern: str, text: str) -> bool:
    """Whether a text matches a regular expression as a whole, in any case and over lines."""
    return re.fullmatch(pattern, text, re.IGNORECASE | re.DOTALL) is not None
