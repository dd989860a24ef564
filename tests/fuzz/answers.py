"""Answers of servers: a socket that says what it is told, asked by each of our clients."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from random import Random

import numpy as np

from mosaic_fast.errors import TrainingError
from mosaic_fast.preferences.endpoint import Endpoint
from mosaic_fast.preferences.prompt import ANSWERS, PairAnswer
from mosaic_rollout.endpoint.client import ChatEndpoint
from mosaic_rollout.engine.sglang.client import SGLangClient
from mosaic_rollout.engine.stats import EngineError
from mosaic_rollout.environments.world import WorldEnvironment
from mosaic_rollout.errors import UserError
from mosaic_rollout.loop.agent_loop import Limits
from mosaic_rollout.loop.chat_agent import ChatAgent
from mosaic_rollout.types import Request, SamplingParams
from tests.fuzz import hostile, verdicts
from tests.fuzz.subject import Subject, Try

KEY = "sk-fuzz-0123456789abcdef"
MOST_TOKENS = 8


class Server:
    """Answers every request with `answer`, raw bytes, and closes the connection."""

    def __init__(self) -> None:
        self.answer = b""
        self.url = ""

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Server]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = [
                line.split(b":")[1] for line in head.lower().split(b"\r\n") if b"content-length:" in line
            ]
            await reader.readexactly(int(length[0]) if length else 0)
            writer.write(self.answer)
            await writer.drain()
        writer.close()


def http(body: bytes, *, kind: str = "application/json") -> bytes:
    """An answer without a fault."""
    return b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (
        kind.encode(),
        len(body),
        body,
    )


def broken_http(random: Random, body: bytes) -> bytes:
    """The body in an answer with a fault: of the status, of a header, of the length, or of everything."""
    status = random.choice((200, 200, 204, 301, 302, 400, 401, 404, 408, 409, 429, 500, 503, 599, 999))
    headers = [b"content-length: %d" % (len(body) + random.choice((0, 0, -1, 1, 100)))]
    headers += random.choices(
        (
            *(b"retry-after: nan", b"retry-after: -1", b"location: http://[", b"location: //"),
            *(b"content-encoding: gzip", b"content-encoding: br", b"transfer-encoding: chunked"),
            *(
                b"content-type: text/html; charset=utf-7",
                b"content-type: x; charset=no-such",
                b"set-cookie: \xff=1",
            ),
            *(b"x: " + b"y" * 70_000, b"x\x00: 1", b"content-length: 7", b": ", b"content-type: \xff\xfe"),
        ),
        k=random.randrange(3),
    )
    if random.random() < 0.2:
        body = gzip.compress(body) if random.random() < 0.5 else gzip.compress(body)[:-9]
    whole = b"HTTP/1.1 %d Some\r\n%s\r\n\r\n%s" % (status, b"\r\n".join(headers), body)
    choice = random.random()
    if choice < 0.1:
        return whole[: random.randrange(len(whole))]
    if choice < 0.15:
        return hostile.text(random).encode()
    return hostile.damaged(random, whole) if choice < 0.25 else whole


@contextlib.contextmanager
def _with_server(ask: Callable[[Random, Server], Coroutine[None, None, str]]) -> Iterator[Try]:
    with asyncio.Runner() as runner:

        async def one(random: Random) -> str:
            async with Server().open() as server:
                return await ask(random, server)

        yield lambda random: runner.run(one(random))


def _answer(random: Random, sound: object, text: Callable[[object], str]) -> tuple[bytes, bool]:
    """An answer to send and whether it is one without a fault."""
    how = random.random()
    if how < 0.1:
        return http(text(sound).encode()), True
    if how < 0.6:
        return http(text(hostile.changed(random, sound)).encode("utf-8", "surrogatepass")), False
    if how < 0.7:
        return http(hostile.damaged(random, text(sound).encode())), False
    if how < 0.75:
        return http(hostile.text(random, megabytes=True).encode()), False
    return broken_http(random, text(sound).encode()), False


async def _ask_engine(random: Random, server: Server) -> str:
    count = random.randrange(1, MOST_TOKENS + 1)
    meta: dict[str, object] = {
        "finish_reason": {"type": random.choice(("stop", "length"))},
        "output_token_logprobs": [[-0.5, i, None] for i in range(count)],
        **{"weight_version": "3", "prompt_tokens": 4, "cached_tokens": 3},
    }
    if random.random() < 0.3:
        meta["weight_versions"] = [{"start": 0, "end": 1, "version": "2"}]
    if random.random() < 0.1:
        meta["finish_reason"] = {"type": "abort", "message": "no", "status_code": random.choice((400, 500))}
    elif random.random() < 0.1:
        meta["output_token_logprobs"] = [[None, 5, None]]  # a NaN, as the server writes it
    sound = {"text": "", "meta_info": meta}
    server.answer, fine = _answer(
        random, sound, lambda found: f"data: {hostile.written(found)}\n\ndata: [DONE]\n\n"
    )
    client = SGLangClient(server.url)
    asked = Request(np.arange(4), SamplingParams(MOST_TOKENS, 1.0, (2,)), 0, 0, 0)
    try:
        sample = await client.generate(asked, seed=None, timeout_s=20.0, on_prefilled=lambda: None)
        await client.call("/server_info", timeout_s=20.0)
    except EngineError as error:
        assert str(error)
        assert not fine or "abort" in str(error) or "no JSON" in str(error), error
        return "refused"
    finally:
        await client.aclose()
    assert 0 < len(sample.token_ids) <= MOST_TOKENS
    assert len(sample.token_ids) == len(sample.logprobs)
    assert sample.token_ids.min() >= 0
    return "accepted"


async def _ask_judge(random: Random, server: Server) -> str:
    shape = ANSWERS["pairwise" if random.random() < 0.5 else "pointwise"]
    given = verdicts.drawn(random, shape) if random.random() < 0.5 else None
    said = {"reason": hostile.text(random), **({"winner": "1"} if shape is PairAnswer else {"score": 3})}
    if random.random() < 0.4:
        said = hostile.changed(random, said)
    content: object = (
        hostile.written(said) if random.random() < 0.9 else hostile.text(random, megabytes=True) + KEY
    )
    message: dict[str, object] = {"role": "assistant", "content": given.text if given else content}
    if given and random.random() < 0.3:
        parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": given.text}]
        message |= {"content": parts, "reasoning": random.choice((None, "hm", {"a": 1}))}
    if given and random.random() < 0.7:
        server.answer, fine = (
            http(hostile.written(_completion(message)).encode("utf-8", "surrogatepass")),
            True,
        )
    else:
        server.answer, fine = _answer(random, _completion(message), hostile.written)
        given = given if fine else None
    endpoint = Endpoint(
        url=server.url, model="m", api_key=KEY, api_key_env="KEY", max_tokens=64,
        timeout_s=20.0, retries=random.randrange(2), backoff_s=0.0, say=lambda text: None,
    )  # fmt: skip
    question = {"role": "user", "content": given.shown if given else "?"}
    try:
        async with endpoint.open() as client:
            reply = await endpoint.ask(client, [question], shape, lambda: None)
    except TrainingError as error:
        assert KEY not in str(error)
        assert not (given and given.clear), error
        return "refused"
    assert isinstance(reply.answer, shape)
    assert KEY not in reply.text
    reply.text.encode()
    if given:
        verdicts.check(given, reply.answer)
    return "accepted"


async def _ask_chat(random: Random, server: Server) -> str:
    """A whole episode: every turn of it gets this answer."""
    message: dict[str, object] = {"role": "assistant", "content": hostile.text(random, megabytes=True)}
    if random.random() < 0.4:
        call = {"name": "read_file", "arguments": hostile.written(hostile.value(random))}
        message["tool_calls"] = [{"id": "c", "type": "function", "function": call}] * random.randrange(1, 3)
    if random.random() < 0.3:
        message["reasoning_content"] = hostile.text(random)
    server.answer, _ = _answer(random, _completion(message), hostile.written)
    agent = ChatAgent(
        ChatEndpoint(
            url=server.url, model="m", api_key=KEY, api_key_env="KEY",
            timeout_s=20.0, retries=random.randrange(2), backoff_s=0.0,
        ),
        Limits(3, 64, 100_000_000),
        protocol=random.choice(("loop", "native")),
        write_tools=random.random() < 0.5,
    )  # fmt: skip
    environment = WorldEnvironment()
    (task,) = environment.sample("train", 1, random.randrange(1000))
    try:
        async with agent.endpoint.open() as client:
            rollout = await agent.play(client, environment, task, 0)
    except UserError as error:
        assert KEY not in str(error)
        return "refused"
    json.dumps([step.call and step.call.arguments for step in rollout.steps], allow_nan=False)
    last = rollout.steps[-1] if rollout.steps else None
    if rollout.status == "refused":
        assert last is not None
        assert last.call is not None
        assert last.call.name == "refusal_tool"
    if rollout.status == "answered":
        assert last is not None
        assert last.answer
    return "played"


def _completion(message: dict[str, object]) -> dict[str, object]:
    usage = {"prompt_tokens": 5, "completion_tokens": 6}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}


ENGINE = Subject("answers of the engine", 0.15, lambda folder: _with_server(_ask_engine))
JUDGE = Subject("answers of a judge", 0.1, lambda folder: _with_server(_ask_judge))
CHAT = Subject("answers of a chat model", 0.1, lambda folder: _with_server(_ask_chat))
