"""A stand-in for an SGLang server, on a socket: all is well but `/generate`, which does what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator

Generate = Callable[[dict[str, object], asyncio.StreamWriter], Awaitable[None]]


def answer(body: object, status: int = 200) -> bytes:
    content = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (
        status,
        len(content),
        content,
    )


@contextlib.contextmanager
def sglang_server(generate: Generate) -> Iterator[str]:
    """Its URL. `generate(request, writer)` writes what it likes; the connection is closed after it."""
    loop = asyncio.new_event_loop()
    served = "-1"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head.lower())
            body = await reader.readexactly(int(length[1]) if length else 0)
            asked = json.loads(body) if body else {}
            path = head.split()[1].partition("?")[0]
            if path == "/generate":
                await generate(asked, writer)
            else:
                served = asked.get("weight_version", served)
                info = {"version": "0.5.23", "max_total_num_tokens": 65_536, "weight_version": served}
                writer.write(answer({"success": True, **info}))
                await writer.drain()
        writer.close()

    async def start() -> int:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
