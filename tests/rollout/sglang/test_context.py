"""A server of somebody else's whose context is shorter than a rollout may be, without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from mosaic_fast.errors import UserError
from mosaic_fast.policy import Policy
from mosaic_fast.setup.engine import _PolicyWeights
from mosaic_rollout.engine.sglang import LaneOptions, SGLangEngine, SGLangOptions
from mosaic_rollout.engine.sglang.client import SGLangClient
from mosaic_rollout.engine.sglang.engine import _VERSION
from tests.policy.policy_helpers import tiny_model


@pytest.mark.parametrize("context", [63, 64, None])
def test_a_server_with_too_short_a_context_is_refused(
    context: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def call(client: SGLangClient, path: str, *_: object, **__: object) -> dict[str, object]:
        return {"version": _VERSION, "context_length": context}

    async def well(engine: SGLangEngine) -> list[str]:
        return [""]

    monkeypatch.setattr(SGLangClient, "call", call)
    monkeypatch.setattr(SGLangEngine, "health", well)
    policy = Policy(tiny_model("qwen2", torch.float32))
    engine = SGLangEngine(
        _PolicyWeights(policy, None),
        ["http://127.0.0.1:9"],
        SGLangOptions(vocab_size=23, max_tokens=64),
        LaneOptions(1.0, 1.0, 1.0, 0),
        folder=tmp_path,
        count=1,
    )
    (lane,) = engine.lanes
    if context == 63:
        with pytest.raises(UserError, match=r"--context-length 63, and rollouts may have 64 tokens"):
            asyncio.run(engine._check_server(lane))
    else:
        asyncio.run(engine._check_server(lane))
