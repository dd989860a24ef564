"""An OpenAI-compatible server, asked for chat completions until an answer can be used.

Tried again, a bounded number of times and with growing waits: no connection, silence, 408, 409, 425, 429,
5xx, and an answer that its reader cannot use. A parameter that the server refuses is renamed or left out from
then on (parameters.py). What is sent and what becomes of an answer is the subclass's: a policy that is
evaluated (client.py), or a judge. Of a completion, keys that are not named here are passed over.
"""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Annotated, TypeVar

import httpx
from pydantic import BaseModel, BeforeValidator, Field, NonNegativeInt, model_validator

from mosaic_rollout.endpoint.parameters import Parameters
from mosaic_rollout.errors import UserError
from mosaic_rollout.plain_json import read_json


@cache
def certificates(*, by_environment: bool = True) -> ssl.SSLContext:
    """What httpx would load for each client anew: 20 ms, for http as well, so that one is made for all.

    by_environment: honour SSL_CERT_FILE and SSL_CERT_DIR. UserError where what they name cannot be read.
    """
    try:
        return httpx.create_ssl_context(trust_env=by_environment)
    except OSError as error:  # ssl.SSLError is one
        named = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), "certifi")
        raise UserError(
            f"the certificates of {named} cannot be read ({error}); name PEM certificates there, or unset it"
        ) from None


def no_cookies() -> CookieJar:
    """For clients of endpoints: no cookie is wanted, and one of broken bytes would break the next request."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=[]))


class CompletionFunction(BaseModel):
    name: str
    arguments: object = None  # JSON text of an object, or the object; anything else is malformed


def _id(found: object) -> object:
    """The id of a call, which some servers number."""
    return str(found) if isinstance(found, int) else found


class CompletionCall(BaseModel):
    """A tool call that the server parsed out of the text."""

    id: Annotated[str | None, BeforeValidator(_id)] = None
    function: CompletionFunction


_PATH = "/chat/completions"  # behind the address, in which some people have it already
_TEXTS = (None, "text", "output_text", "refusal")  # which OpenAI's server tells apart from other text
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
            told = (part.get(key) for key in ("text", "refusal", *_THOUGHTS))
            texts += [text for text in map(_thought, told) if isinstance(text, str)]
    return "".join(texts) if texts else None


_Thought = Annotated[str | None, BeforeValidator(_thought)]


class CompletionMessage(BaseModel):
    content: Annotated[str | None, BeforeValidator(_text)] = None
    reasoning_content: _Thought = None
    reasoning: _Thought = None  # the same under vLLM's newer name
    safety_thoughts: _Thought = None  # the check, from a server of ours
    tool_calls: list[CompletionCall] | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_its_place(cls, value: object) -> object:
        """A thought that is a part of the content is told apart from it; a refusal is what is said."""
        if isinstance(value, Mapping) and isinstance(value.get("refusal"), str) and not value.get("content"):
            value = {**value, "content": value["refusal"]}
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


SHOWN_CHARS = 300  # of what a server said, in a message
_CONNECT_S = 10.0
_LONGEST_WAIT_S = 60.0  # between two tries
_TRIED_AGAIN = (408, 409, 425, 429)  # and 5xx

Answer = TypeVar("Answer")


class TryAgain(Exception):
    """This try failed in a way that the next may not. `wait_s`: what the server asked for."""

    def __init__(self, what: str, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class NoAnswer(Exception):
    """Every try failed. The text says how the last one did, without the key."""


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """Where and how to ask. The key is sent as a header and appears in no message of this program."""

    url: str  # the base that ends in /v1
    model: str
    api_key: str | None
    api_key_env: str | None  # the environment variable that the key came from, or may be put into
    temperature: float = 0.0
    timeout_s: float = 120.0
    retries: int = 4
    backoff_s: float = 1.0
    option: Callable[[str], str] = str  # how the user writes a setting
    parameters: Parameters = field(default_factory=Parameters)  # as this server takes them
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr)  # once for each that is changed

    def open(self) -> httpx.AsyncClient:
        """A client to ask with; use it as a context manager.

        UserError for a key no header can carry, or a proxy of the environment that is none.
        """
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError(
                f"{self.option('api_key_env')}: the key in ${self.api_key_env} has characters that no HTTP "
                "header can carry"
            )
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx.Timeout(self.timeout_s, connect=_CONNECT_S)
        limits = httpx.Limits(max_connections=None)
        try:
            return httpx.AsyncClient(
                headers=headers, timeout=timeout, limits=limits, cookies=no_cookies(), verify=certificates()
            )
        except (ValueError, ImportError, httpx.InvalidURL):  # not repeated: a proxy may have a password
            raise UserError(
                f"{self.url} cannot be asked: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY is none; "
                "unset it, or name an http:// proxy"
            ) from None

    async def post(
        self,
        http: httpx.AsyncClient,
        asked: Mapping[str, object],
        read: Callable[[httpx.Response], Answer],
        before_try: Callable[[], None] = lambda: None,
    ) -> tuple[Answer, int]:
        """What `read` makes of the answer, and the number of tries.

        They are at most `retries` + 1, and one more for each parameter that is changed for the server.
        asked: the request beside model and temperature. read: raises TryAgain for what cannot be used,
        anything else where asking again would not help. before_try: may refuse a try.
        NoAnswer after the last one.
        """
        whole = {"model": self.model, "temperature": self.temperature, **asked}
        address = self.url.rstrip("/").removesuffix(_PATH).rstrip("/") + _PATH
        reason, tries, attempt = "", 0, 0
        while attempt <= self.retries:
            before_try()
            tries += 1
            asked_s = 0.0
            body = self.parameters.sent(whole)
            try:
                async with asyncio.timeout(self.timeout_s):
                    response = await http.post(address, json=body)
                if response.status_code in _TRIED_AGAIN or response.status_code >= 500:
                    raise TryAgain(
                        f"HTTP {response.status_code} {self.shown(response)}", _retry_after(response)
                    )
                if (change := self.parameters.change_after(whole, body, response)) is not None:
                    if change:
                        self.say(f"{self.url}: {change} from now on: the server says {self.shown(response)}")
                    continue
                return read(response), tries
            except TryAgain as failure:
                reason, asked_s = str(failure), failure.wait_s
            except TimeoutError:
                reason = f"no answer within {self.option('timeout_s')} = {self.timeout_s:g}"
            except httpx.RequestError as error:  # a broken compression or a redirect among them
                reason = f"{type(error).__name__}: {error}"
            if attempt < self.retries:  # apart, so that all do not return at once
                wait_s = self.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(max(wait_s, asked_s), _LONGEST_WAIT_S))
            attempt += 1
        raise NoAnswer(self.hide(reason))

    def completion(self, response: httpx.Response, text: str) -> ChatCompletion:
        """The chat completion in `text`, the body or what is left of it. TryAgain where it holds none."""
        try:
            return read_completion(text)
        except ValueError:  # pydantic's own is one
            raise TryAgain(f"not a chat completion: {self.shown(response)!r}") from None

    def shown(self, response: httpx.Response) -> str:
        """The beginning of a body, for a message."""
        return self.hide(response.text)[:SHOWN_CHARS]  # hidden before it is cut: half a key is not found

    def hide(self, text: str) -> str:
        """A text without the key, which a server may repeat."""
        return text.replace(self.api_key, "***") if self.api_key else text


def _retry_after(response: httpx.Response) -> float:
    """Seconds a server asks to wait; dates and nonsense count as none."""
    try:
        return max(0.0, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
