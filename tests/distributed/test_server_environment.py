"""A server that a rank starts is no rank."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mosaic_rollout.engine.sglang.server import ServerOptions, ServerProcess
from mosaic_rollout.engine.stats import EngineError

OF_THE_JOB = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "ROLE_NAME": "default",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "a",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}


def test_a_server_is_not_told_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the environment that a program in the place of its Python is started with."""
    for name, value in OF_THE_JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")  # of the machine, not of the job
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\n")
    fake.chmod(0o755)
    options = ServerOptions(fake, "cpu", "float32", 512, 8, 4096, False, False, 0, 5.0, 5.0)
    with pytest.raises(EngineError, match="exited with 0 while starting"):
        asyncio.run(ServerProcess(options, tmp_path / "log", 0).start(tmp_path, 0))
    lines = (tmp_path / "environment").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if "=" in line)
    assert not OF_THE_JOB.keys() & given.keys()
    assert given["NCCL_SOCKET_IFNAME"] == "eth7"
    assert given["HF_HUB_OFFLINE"] == "1"
