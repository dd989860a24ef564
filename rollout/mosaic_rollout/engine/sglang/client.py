"""One SGLang server's native HTTP API: token ids in, token ids and log-probs out."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import httpx
import numpy as np
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError

from mosaic_rollout.endpoint.server import certificates, no_cookies
from mosaic_rollout.engine.stats import EngineError
from mosaic_rollout.types import FinishReason, JsonValue, Request

_CONNECT_S = 10.0
_KEPT_OPEN_S = 2.0
_ONE_CHUNK = 1 << 30  # tokens between streamed chunks: the first token at once, the rest at the end


_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class ServerUnavailableError(EngineError):
    """No answer, or half of one: the server is dead, hung or restarting. The request can be sent again."""


class ServerRefusedError(EngineError):
    """The server answered that it will not do this; asking again would not help."""


@dataclass(frozen=True)
class Sample:
    """What the server generated for one request. N tokens."""

    token_ids: np.ndarray  # [N] int64, the stop token included
    logprobs: np.ndarray  # [N] float32, at the sampling temperature
    weight_version: int  # of the weights that made the last token; -1 where the server's is not a number
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float  # from sending to the first token


class SGLangClient:
    """Talks to one server from one event loop. `aclose` it before the loop ends."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=httpx.Timeout(None, connect=_CONNECT_S),  # each call has a deadline of its own
            # given up before the server does, at 5 s: no request may meet a connection being closed
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=256, keepalive_expiry=_KEPT_OPEN_S
            ),
            cookies=no_cookies(),
            trust_env=False,  # a proxy for the internet is not for this
            verify=certificates(by_environment=False),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def generate(
        self, request: Request, *, seed: int | None, timeout_s: float, on_prefilled: Callable[[], None]
    ) -> Sample:
        """Sample a continuation; `on_prefilled` is called once the prompt is in the server's prefix cache.

        seed: honoured by a server in deterministic mode only. Raises ServerUnavailableError at the deadline.
        """
        sampling: dict[str, JsonValue] = {
            "max_new_tokens": request.sampling.max_new_tokens,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "stop_token_ids": list(request.sampling.stop_token_ids),
            "stream_interval": _ONE_CHUNK,
        }
        if seed is not None:
            sampling["sampling_seed"] = seed
        body = {
            "input_ids": request.token_ids.tolist(),
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": -1,  # the output's only: asking for the prompt's would forgo its cache
            "stream": True,
        }
        sent, first_token_s = time.perf_counter(), 0.0
        last: dict[str, object] = {}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.stream("POST", "/generate", json=body) as response,
            ):
                if response.status_code != 200:
                    raise self._refusal("/generate", response.status_code, await response.aread())
                async for line in _lines(response):
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    last = self._object(line.removeprefix("data: "))
                    if "error" in last:
                        raise self._refusal("/generate", 500, line.encode())
                    if not first_token_s:
                        first_token_s = time.perf_counter() - sent
                        on_prefilled()
        except (httpx.HTTPError, httpx.StreamError, OSError, TimeoutError) as error:
            raise self._unavailable(error, timeout_s) from error
        return self._sample(last, request.sampling.max_new_tokens, first_token_s)

    async def call(
        self, path: str, body: Mapping[str, JsonValue] | None = None, *, timeout_s: float, method: str = ""
    ) -> dict[str, JsonValue]:
        """Any other endpoint: POST with a body, GET without; the JSON object it answers, empty if none."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.request(
                    method or ("GET" if body is None else "POST"), path, json=body
                )
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            raise self._unavailable(error, timeout_s) from error
        if response.status_code != 200:
            raise self._refusal(path, response.status_code, response.content)
        try:
            answer = json.loads(response.text)
        except (ValueError, RecursionError):
            return {}
        return answer if isinstance(answer, dict) else {}

    async def flush_cache(self, timeout_s: float) -> None:
        """Empty the prefix cache. The server refuses while requests run; a few may be on their way out."""
        await self.call(f"/flush_cache?timeout={timeout_s:.0f}", {}, timeout_s=timeout_s + _CONNECT_S)

    async def weight_version(self, timeout_s: float) -> str:
        """The version of the weights that the server says it serves."""
        return str((await self.call("/model_info", timeout_s=timeout_s)).get("weight_version"))

    def _sample(self, answer: Mapping[str, object], most: int, first_token_s: float) -> Sample:
        """The last chunk of an answer, read. Half of one, or one of another shape, can be asked for again."""
        if not isinstance(answer.get("meta_info"), dict):
            raise ServerUnavailableError(f"{self.url}: the answer broke off before the request was finished")
        try:
            meta = _Meta.model_validate(answer["meta_info"])
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ServerUnavailableError(
                f"{self.url}: an answer of another shape than SGLang's, {where}: {first['msg']}"
            ) from None
        if meta.finish_reason is None:
            raise ServerUnavailableError(f"{self.url}: the answer broke off before the request was finished")
        kind, message = meta.finish_reason.type, meta.finish_reason.message
        if kind == "abort":
            error = ServerRefusedError if meta.finish_reason.status_code == 400 else ServerUnavailableError
            raise error(f"{self.url} aborted a request: {message or 'no reason given'}")
        count = len(meta.output_token_logprobs)
        if not 0 < count <= most:
            raise ServerUnavailableError(f"{self.url} answered {count} tokens, asked for 1 to {most}")
        return Sample(
            token_ids=np.array([token[1] for token in meta.output_token_logprobs], np.int64),
            logprobs=np.array([token[0] for token in meta.output_token_logprobs], np.float32),
            weight_version=meta.last_version(),
            finish_reason="length" if kind == "length" else "stop",
            prompt_tokens=meta.prompt_tokens,
            cached_tokens=meta.cached_tokens,
            first_token_s=first_token_s,
        )

    def _object(self, text: str) -> dict[str, object]:
        """A chunk of a stream. ServerUnavailableError where it is no JSON object."""
        try:
            value: object = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ServerUnavailableError(f"{self.url} answered what is no JSON object: {text[:200]!r}")
        return value

    def _refusal(self, path: str, status: int, body: bytes) -> EngineError:
        text = body.decode(errors="replace").strip()[:500]
        if status >= 500:
            return ServerUnavailableError(f"{self.url}{path} answered {status}: {text}")
        return ServerRefusedError(f"{self.url}{path} refused the request ({status}): {text}")

    def _unavailable(self, error: Exception, timeout_s: float) -> ServerUnavailableError:
        if isinstance(error, TimeoutError):
            return ServerUnavailableError(f"{self.url} gave no answer within {timeout_s:g} s")
        detail = str(error) or "connection lost"
        return ServerUnavailableError(f"{self.url} cannot be reached: {type(error).__name__}, {detail}")


class _Reason(BaseModel):
    type: str
    message: str | None = None
    status_code: int | None = None


class _Span(BaseModel):
    start: NonNegativeInt
    end: NonNegativeInt
    version: int | str | None = None


class _Meta(BaseModel):
    """What is read of a finished request's `meta_info`."""

    finish_reason: _Reason | None = None
    output_token_logprobs: list[tuple[float | None, _TokenId, object]] = Field(default_factory=list)
    weight_version: int | str | None = None
    weight_versions: list[_Span] | None = None
    prompt_tokens: NonNegativeInt = 0
    cached_tokens: NonNegativeInt = 0

    def last_version(self) -> int:
        """Version of the weights that made the last token."""
        last, version = len(self.output_token_logprobs) - 1, self.weight_version
        for span in self.weight_versions or ():
            if span.start <= last < span.end:
                version = span.version
        return _number(version)


def _number(version: int | str | None) -> int:
    text = str(version)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream. httpx's own also end at U+2028 and its like, which JSON texts may hold."""
    parts: list[bytes] = []
    async for chunk in response.aiter_bytes():
        head, *others = chunk.split(b"\n")
        parts.append(head)
        for other in others:
            yield b"".join(parts).decode("utf-8", "replace").rstrip("\r")
            parts = [other]
    yield b"".join(parts).decode("utf-8", "replace").rstrip("\r")
