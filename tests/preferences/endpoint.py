"""A real HTTP server that answers in OpenAI's format, or in whatever way a test wants it to fail."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Json = dict[str, object]


@dataclass(frozen=True)
class Raw:
    """An answer below the level of a chat completion."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    stall_s: float = 0.0
    half: bool = False  # promise more bytes than are sent


@dataclass
class Served:
    """What a server was asked."""

    url: str = ""
    requests: list[Json] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0


def completion(content: object, *, finish_reason: str = "stop") -> str:
    """The body of a chat completion."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})


def shown(request: Json) -> Json:
    """The data block of a question, decoded as a judge would read it."""
    messages = request["messages"]
    assert isinstance(messages, list)
    (block,) = re.findall(r"\A<data (\w+)>\n(.*)\n</data \1>\n", messages[1]["content"])
    return json.loads(block[1])


@contextmanager
def endpoint(answer: Callable[[Json], Raw | Json]) -> Iterator[Served]:
    """Serve `answer(request)`: a dict is the judge's JSON answer, Raw anything else."""
    served, lock = Served(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                served.requests.append(request)
                served.keys.append(self.headers.get("authorization"))
                served.paths.append(self.path)
                served.under_way += 1
                served.most_under_way = max(served.most_under_way, served.under_way)
            given = answer(request)
            raw = given if isinstance(given, Raw) else Raw(body=completion(given))
            time.sleep(raw.stall_s)
            with lock:
                served.under_way -= 1
            body = raw.body.encode()
            self.send_response(raw.status)
            for name, value in raw.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body) + 100 * raw.half))
            with contextlib.suppress(OSError):  # a client that has hung up
                self.end_headers()
                self.wfile.write(body)
                if raw.half:
                    self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
