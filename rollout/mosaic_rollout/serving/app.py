"""The HTTP side: routes, keys, streams of events, and a server on a port."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive
from uvicorn import Config, Server

from mosaic_rollout.errors import UserError
from mosaic_rollout.serving.protocol import ApiError, read_request
from mosaic_rollout.serving.service import Service, Session
from mosaic_rollout.serving.stream import Head, chunks, whole_answer

_LARGEST = 64 * 2**20  # bytes of a request
Result = TypeVar("Result")


@dataclass(frozen=True)
class Access:
    """Whose session a request belongs to, by its key.

    open: for everybody without a key, or for nobody. by_key: of those who have one.
    """

    open: Session | None = None
    by_key: dict[str, Session] = field(default_factory=dict)

    def session(self, headers: Mapping[str, str]) -> Session:
        """ApiError where the key is missing or wrong."""
        key = headers.get("authorization", "").removeprefix("Bearer ").strip()
        for known, session in self.by_key.items():  # each is compared: how long it takes tells nothing
            if hmac.compare_digest(known.encode(), key.encode()):
                return session
        if self.open is not None:
            return self.open
        raise ApiError(
            "the key is missing or not one of this server's; send it as 'Authorization: Bearer KEY'",
            status=401,
            code="invalid_api_key",
        )


def chat_app(service: Service, access: Access, say: Callable[[str], None] = lambda line: None) -> Starlette:
    """The service as an ASGI application: /v1/chat/completions and /v1/models.

    say: told of each request that is refused or fails, in a line.
    """
    listed = {"id": service.model, "object": "model", "created": int(time.time()), "owned_by": "mosaic_fast"}

    async def complete(request: Request) -> Response:
        session = access.session(request.headers)
        asked = read_request(await _body(request))
        head = Head(service.model)
        if asked.stream:
            gone = asyncio.Event()
            events = _events(chunks(service, session, asked, head, gone))
            first = await _while_there(request, anext(events))  # a mistake is told by its status
            return _Stream(_after(first, events), gone)
        answered = await _while_there(request, service.answer(session, asked))
        return JSONResponse(whole_answer(answered, asked, head, service.chat))

    async def models(request: Request) -> Response:
        access.session(request.headers)
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [listed]})
        if name != service.model:
            raise ApiError(f"there is no model {name!r}", status=404, param="model", code="model_not_found")
        return JSONResponse(listed)

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            there = "POST /v1/chat/completions and GET /v1/models are"
            error = ApiError(f"this is not served; {there}", status=error.status_code)
        elif not isinstance(error, ApiError):
            error = ApiError(f"{type(error).__name__}: {error}", status=500)
        text = " ".join(str(error).split())
        say(f"{request.method} {request.url.path}: {error.status}, {text}")
        return JSONResponse(error.body(), status_code=error.status)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", models),
        ],
        exception_handlers={ApiError: refused, HTTPException: refused, Exception: refused},
    )


async def _body(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # A page in a browser may send other kinds to a local server without asking it first.
        raise ApiError("the content type must be application/json", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST:
            raise ApiError(f"the request is larger than {_LARGEST} bytes", status=413)
    return bytes(body)


async def _while_there(request: Request, work: Awaitable[Result]) -> Result:
    """The result of the work, which ends early where the client hangs up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("the client has hung up", status=499)
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class _Stream(StreamingResponse):
    """Events while the client is there. `gone` is set where it hangs up: a stream that never waits for long
    is not cancelled otherwise."""

    def __init__(self, events: AsyncIterator[bytes], gone: asyncio.Event) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._gone = gone

    async def listen_for_disconnect(self, receive: Receive) -> None:
        await super().listen_for_disconnect(receive)
        self._gone.set()


async def _events(told: AsyncIterator[dict[str, object]]) -> AsyncIterator[bytes]:
    """A stream's events. What goes wrong before the first one is raised, afterwards it is an event."""
    begun = False
    try:
        async for chunk in told:
            begun = True
            yield _event(chunk)
    except ApiError as error:
        if not begun:
            raise
        yield _event(error.body())
    yield b"data: [DONE]\n\n"


def _event(value: object) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


async def _after(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in events:
        yield event


class _Quiet(Server):
    """A server that leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens on a port; 0: on any that is free. UserError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there: {error}") from None
    return listening


@contextlib.asynccontextmanager
async def running(app: Starlette, listening: socket.socket) -> AsyncIterator[str]:
    """The application served in this event loop: the base URL that clients are given."""
    server = _Quiet(Config(app, log_level="critical", access_log=False, lifespan="off"))
    task = asyncio.create_task(server.serve(sockets=[listening]), name="HTTP server")
    host, port = listening.getsockname()[:2]
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    finally:
        server.should_exit = server.force_exit = True
        await asyncio.gather(task, return_exceptions=True)
        listening.close()
