"""A stand-in for the hub: as much of its protocol as huggingface_hub asks of it for a snapshot.

Per repository: what a revision is (`/api/models/R/revision/V`), the tree of a commit, and files by `resolve`;
large ones are LFS's, which `resolve` redirects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = 100_000
REPO = "org/agent"
TOKEN = "hf_of_a_test"


@dataclass
class HubServer:
    """Repositories as `models/org/name` or `datasets/org/name`: commit -> file -> bytes."""

    commits: dict[str, dict[str, Mapping[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def push(self, repo: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Put files there as a new commit of a revision; the commit."""
        text = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()})
        commit = hashlib.sha1((repo + text).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.refs.setdefault(repo, {})[revision] = commit
        return commit

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if parts[0] == "lfs":
            return 200, {}, self.commits["/".join(parts[1:4])][parts[4]]["/".join(parts[5:])]
        api = parts[0] == "api"
        parts = parts[1:] if api else parts if parts[0] == "datasets" else ["models", *parts]
        if len(parts) < 4:  # what else the library asks of a hub
            return 404, {}, b"{}"
        repo, kind, rest = "/".join(parts[:3]), parts[3], parts[4:]
        if repo not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if repo in self.gated and token != f"Bearer {TOKEN}" and kind != "revision":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        commit = self.refs[repo].get(rest[0], rest[0])
        if commit not in self.commits[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self.commits[repo][commit]
        if kind == "revision":
            info = {"id": "/".join(parts[1:3]), "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            return 200, {}, json.dumps(info).encode()
        if kind == "tree":
            return 200, {}, json.dumps([_entry(name, data) for name, data in files.items()]).encode()
        name = "/".join(rest[1:])
        data, headers = files[name], {"X-Repo-Commit": commit}
        if len(data) < LARGE:
            return 200, {**headers, "ETag": f'"{_oid(data)}"'}, data
        linked = {"X-Linked-ETag": f'"{_sha(data)}"', "X-Linked-Size": str(len(data))}
        return (
            302,
            {
                **headers,
                **linked,
                "Location": f"{self.url.replace('127.0.0.1', 'localhost')}/lfs/{repo}/{commit}/{name}",
            },
            b"",
        )


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
    return entry | (
        {"lfs": {"oid": _sha(data), "size": len(data), "pointerSize": 130}} if len(data) >= LARGE else {}
    )


@contextmanager
def serving() -> Iterator[HubServer]:
    """A hub that listens on this machine."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            status, headers, body = hub.answer(self.path, self.headers["Authorization"])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the embedded model under a name, an empty cache, and an empty working directory."""
    with serving() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        (tmp_path / "cwd").mkdir()
        monkeypatch.chdir(tmp_path / "cwd")
        server.push(f"models/{REPO}", model_data())
        yield server


def model_data(**settings: object) -> dict[str, bytes]:
    """The embedded model's files, with other settings; and one that nobody needs."""
    folder = Path(str(files("mosaic_fast.setup").joinpath("embedded")))
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    config = json.loads(found["config.json"]) | settings
    return found | {"config.json": json.dumps(config).encode(), "original/model.safetensors": b"x" * 200_000}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on huggingface_hub asks nobody."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
