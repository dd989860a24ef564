"""Colocated servers: what is freed and taken back, in which order and how often; and what is handed over."""

from __future__ import annotations

import asyncio
import base64
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing import reductions

from mosaic_fast.policy import Policy
from mosaic_fast.setup.engine import _PolicyWeights
from mosaic_rollout.engine.sglang import LaneOptions, SGLangEngine, SGLangOptions
from mosaic_rollout.engine.sglang import weights as hand_over
from mosaic_rollout.engine.sglang.client import ServerUnavailableError, SGLangClient
from mosaic_rollout.engine.sglang.engine import _VERSION
from tests.policy.policy_helpers import tiny_model


class Server:
    """SGLang's side of the calls: like it, it ends when it is told to take back what it has."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.away: set[str] = set()
        self.version, self.failing = "default", ""

    async def call(self, client: SGLangClient, path: str, body: object = None, **_: object) -> object:
        given = body if isinstance(body, dict) else {}
        if path.endswith("_memory_occupation"):
            self.calls.append(f"{path.split('_')[0].strip('/')} {' '.join(given['tags'])}")
            if path.startswith("/release"):
                self.away |= set(given["tags"])
            else:
                self.away -= {self.away.remove(tag) or tag for tag in given["tags"]}  # KeyError, as there
        elif path == "/update_weights_from_disk":
            assert "weights" not in self.away, "loaded into memory that is not there"
            self.calls.append("load")
            if self.failing == "load":
                self.failing = ""
                raise ServerUnavailableError("lost")
            self.version = given["weight_version"]
        elif path == "/health_generate":
            assert not self.away, "it cannot generate without its memory"
        return {"version": _VERSION, "weight_version": self.version}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(SGLangClient, "call", lambda *args, **options: server.call(*args, **options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: server.calls.append("free"))
    return server


@pytest.fixture
def engine(server: Server, tmp_path: Path) -> SGLangEngine:
    """Serves version 1, and has given its memory back."""
    engine = SGLangEngine(
        _PolicyWeights(Policy(tiny_model("qwen2", torch.float32)), None),
        ["http://127.0.0.1:9"],
        SGLangOptions(vocab_size=23, max_tokens=64, colocated=True),
        LaneOptions(1.0, 1.0, 1.0, 0),
        folder=tmp_path,
    )
    update(engine, 1)
    assert server.calls == ["load", "release kv_cache weights"]
    server.calls.clear()
    return engine


def update(engine: SGLangEngine, version: int) -> None:
    async def run() -> None:
        await engine.update_weights(version)
        await engine.release()

    asyncio.run(run())


def test_the_trainer_frees_its_memory_before_a_server_takes_it_back(engine: SGLangEngine, server: Server):
    update(engine, 2)
    awake = ["free", "resume weights", "load", "free", "resume kv_cache"]
    assert server.calls == [*awake, "release kv_cache weights"]


def test_after_a_failure_nothing_is_taken_back_twice(engine: SGLangEngine, server: Server):
    """A second time would end the scheduler."""
    server.failing = "load"
    update(engine, 2)
    assert [call for call in server.calls if call.startswith("resume")] == [
        "resume weights",
        "resume kv_cache",
    ]
    assert server.version == "2"


def test_a_server_that_was_started_anew_has_its_memory(engine: SGLangEngine, server: Server):
    """It has forgotten the version that it served, and is not told to take anything back."""
    lane = engine.lanes[0]

    async def back() -> None:
        server.away, server.version = set(), "default"
        engine._version = 2
        await engine._restore(lane)
        await lane.aclose()

    asyncio.run(back())
    assert server.calls == ["load"]


def test_a_launched_server_starts_on_free_memory(
    engine: SGLangEngine, server: Server, monkeypatch: pytest.MonkeyPatch
):
    async def start(folder: Path, version: int) -> None:
        server.calls.append("start")
        server.version = str(version)

    lane = engine.lanes[0]
    monkeypatch.setattr(lane, "process", SimpleNamespace(start=start, url="http://127.0.0.1:9"))
    asyncio.run(engine._restore(lane))
    assert server.calls == ["free", "start"]


def test_tensors_are_handed_over_by_the_uuid_of_their_gpu(monkeypatch: pytest.MonkeyPatch):
    """A server may see other GPUs than the trainer, and count them otherwise: SGLang looks for the UUID."""
    monkeypatch.setattr(
        reductions,
        "reduce_tensor",
        lambda x: (reductions.rebuild_cuda_tensor, (*range(6), x.device.index, 7)),
    )
    asked: list[object] = []
    properties = SimpleNamespace(uuid="4e6f-gpu")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: asked.append(gpu) or properties)
    with FakeTensorMode():
        text = hand_over._handles([("w", torch.empty(2, device="cuda:1"))])
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *arguments: arguments)
    assert pickle.loads(base64.b64decode(text)) == [("w", (0, 1, 2, 3, 4, 5, "4e6f-gpu", 7))]
    assert asked == [torch.device("cuda", 1)]
