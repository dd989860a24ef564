"""The protocol over HTTP: mistakes as OpenAI tells them, keys, streams, clients that hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.serving.app import Access, bound, chat_app, running
from mosaic_rollout.serving.history import History
from mosaic_rollout.serving.service import Service, Session
from mosaic_rollout.types import Completion, Request
from tests.rollout.engine.helpers import tiny_model
from tests.rollout.scripted import CountingEpisode, ScriptedEngine, call
from tests.rollout.tokenizers_for_tests import WITH_TOOLS, byte_tokenizer

PATH = "/v1/chat/completions"
Row = dict[str, Any]
"""JSON as it is read."""
LONG = {"role": "user", "content": "a" * 2000}
NAMED = {"type": "function", "function": {"name": "x"}}
ASK: Row = {"model": "m", "messages": [{"role": "user", "content": "go"}], "tools": CountingEpisode().tools}


def service(say: str = "<think>p</think>so it is") -> Service:
    chat = Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)
    return Service(ScriptedEngine(chat, lambda text, key: say), chat, "m", 1000, 300)


def ask(
    served: Service, *, key: str | None = None, access: Access | None = None, **how: Any
) -> httpx.Response:
    """(status, body) of a request to the app, without a port."""
    said: list[str] = []
    app = chat_app(served, access or Access(open=Session(History(served.chat))), said.append)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as http:
            return await http.request(how.pop("method", "POST"), how.pop("path", PATH), **how)

    response = asyncio.run(send())
    assert len(said) == (response.status_code != 200)
    assert all("\n" not in line for line in said)
    return response


@pytest.mark.parametrize(
    ("how", "status", "param", "said"),
    [
        ({"content": b'{"model": ', "headers": {"content-type": "application/json"}}, 400, None, "JSON"),
        ({"content": b"[1]", "headers": {"content-type": "application/json"}}, 400, None, "object"),
        ({"content": b"\xff", "headers": {"content-type": "application/json"}}, 400, None, "JSON"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, None, "application/json"),
        ({"json": {}}, 400, "model", "missing"),
        ({"json": {**ASK, "model": "gpt"}}, 404, "model", "'m'"),
        ({"json": {**ASK, "messages": []}}, 400, "messages", "at least 1"),
        ({"json": {**ASK, "messages": [{"role": "x"}]}}, 400, "messages", "role 'x'"),
        ({"json": {**ASK, "messages": [LONG]}}, 400, "messages", "context"),
        ({"json": {**ASK, "temperature": "warm"}}, 400, "temperature", "number"),
        ({"json": {**ASK, "top_p": 0}}, 400, "top_p", "greater than 0"),
        ({"json": {**ASK, "n": 0}}, 400, "n", "greater"),
        ({"json": {**ASK, "tools": [{"type": "function"}]}}, 400, "tools.0.function", "missing"),
        ({"json": {**ASK, "warmth": 1}}, 400, "warmth", "unknown"),
        ({"json": {**ASK, "response_format": {"type": "json_object"}}}, 400, "response_format", "supported"),
        ({"json": {**ASK, "logit_bias": {"5": 1}}}, 400, "logit_bias", "supported"),
        ({"json": {**ASK, "tool_choice": "required"}}, 422, "tool_choice", "8 draws"),
        ({"json": {**ASK, "tool_choice": NAMED}}, 400, "tool_choice", "'x'"),
        ({"path": "/v1/embeddings", "json": {}}, 404, None, "not served"),
        ({"method": "GET"}, 405, None, "not served"),
        ({"method": "GET", "path": "/v1/models/gpt"}, 404, "model", "gpt"),
    ],
)  # fmt: skip
def test_a_mistake_is_an_error_as_openai_tells_it(how: Row, status: int, param: str, said: str):
    response = ask(service(), **how)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_taken():
    more = {"user": "u", "frequency_penalty": 0, "response_format": {"type": "text"}, "stop": None, "seed": 3}
    body = ask(service(), json={**ASK, **more, "logprobs": True, "n": 2}).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["so it is"] * 2
    assert body["choices"][0]["message"]["reasoning_content"] == "p"
    rows = body["choices"][1]["logprobs"]["content"]
    assert "".join(row["token"] for row in rows) == "<think>p</think>so it is<|im_end|>"
    assert body["usage"]["completion_tokens"] == 2 * len(rows)


def test_an_engine_that_fails_is_a_server_error():
    class Broken(ScriptedEngine):
        async def generate(self, requests: Sequence[Request]) -> list[Completion]:
            raise RuntimeError("no\nmore")

    broken = service()
    broken = Service(Broken(broken.chat, lambda text, key: ""), broken.chat, "m", 1000, 300)
    with pytest.raises(RuntimeError):  # the transport of the test raises what a port would only have told
        ask(broken, json=ASK)


def test_a_key_is_wanted_where_there_is_one():
    served = service()
    access = Access(by_key={"secret": Session(History(served.chat))})
    for key in (None, "Secret", "secre"):
        response = ask(served, key=key, access=access, json=ASK)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert ask(served, key=key, access=access, method="GET", path="/v1/models").status_code == 401
    assert ask(served, key="secret", access=access, json=ASK).status_code == 200
    listed = ask(served, key="secret", access=access, method="GET", path="/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["m"]


def events(text: str) -> list[Row]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_adds_up_to_the_answer():
    served = service(f"<think>p</think><safety_thoughts>c</safety_thoughts>first {call('read')}")
    told = events(ask(served, json={**ASK, "stream": True, "stream_options": {"include_usage": True}}).text)
    *chunks, usage = told
    assert usage["usage"]["total_tokens"] > 0
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    added: Row = {}
    for chunk in chunks:
        for name, value in chunk["choices"][0]["delta"].items():
            added[name] = added.get(name, "") + value if isinstance(value, str) else value
    assert (added["reasoning_content"], added["safety_thoughts"], added["content"]) == ("p", "c", "first")
    assert added["tool_calls"][0]["function"] == {"name": "read", "arguments": "{}"}
    assert ask(served, json={**ASK, "stream": True, "model": "x"}).status_code == 404


@asynccontextmanager
async def on_a_port(served: Service, session: Session) -> AsyncIterator[httpx.AsyncClient]:
    async with running(chat_app(served, Access(open=session)), bound("127.0.0.1", 0)) as url:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits, trust_env=False) as http:
            yield http


class Endless(LocalEngine):
    """No token ends a turn, so that whatever is drawn it has all its tokens."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return await super().generate(
            [replace(one, sampling=replace(one.sampling, stop_token_ids=())) for one in requests]
        )


def local(max_tokens: int = 40) -> tuple[Service, LocalEngine]:
    """A tiny random model whose turns end at their limit; its tokens are bytes of no meaning."""
    chat = Chat(byte_tokenizer(WITH_TOOLS), teach_loop=False)
    model = tiny_model(vocab_size=len(chat.tokenizer), max_position_embeddings=4096)
    engine = Endless(model)
    return Service(engine, chat, "m", 4000, max_tokens), engine


def test_a_client_that_hangs_up_frees_its_rows_and_leaves_no_answer():
    served, engine = local(3800)
    session = Session(History(served.chat))

    async def hang_up() -> None:
        async with on_a_port(served, session) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/chat/completions", json=ASK, timeout=0.3)
            async with http.stream("POST", "/chat/completions", json={**ASK, "stream": True}) as response:
                async for _ in response.aiter_lines():
                    break
            for _ in range(400):
                if not engine._scheduler.busy:
                    break
                await asyncio.sleep(0.02)
            assert not engine._scheduler.busy
            whole = await http.post("/chat/completions", json={**ASK, "max_tokens": 3})
            assert whole.json()["choices"][0]["finish_reason"] == "length"

    asyncio.run(hang_up())
    assert len(session.history.turns) == 1


def test_requests_at_once_are_batched_and_each_gets_its_own():
    """What each of forty clients gets is what it gets alone."""
    served, engine = local(12)
    asked = [
        {**ASK, "messages": [{"role": "user", "content": f"go {number}"}], "seed": number, "logprobs": True}
        for number in range(40)
    ]

    async def all_at_once() -> tuple[list[Row], list[Row]]:
        async with on_a_port(served, Session(History(served.chat))) as http:
            together = await asyncio.gather(*(http.post("/chat/completions", json=one) for one in asked))
            alone = [await http.post("/chat/completions", json=one) for one in asked[::13]]
            return [r.json()["choices"][0]["logprobs"] for r in together], [
                r.json()["choices"][0]["logprobs"] for r in alone
            ]

    together, alone = asyncio.run(all_at_once())
    assert engine.stats.decode_iterations < 12 * 40 / 2
    for one, other in zip(together[::13], alone, strict=True):
        assert [row["token"] for row in one["content"]] == [row["token"] for row in other["content"]]
