"""An engine over a real server, and what it is compared with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from mosaic_fast.policy import Policy
from mosaic_fast.setup.model_folder import model_folder
from mosaic_kernels import pack_forest
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.engine.sglang import LaneOptions, ServerOptions, SGLangEngine, SGLangOptions
from mosaic_rollout.engine.sglang.weights import Transport
from mosaic_rollout.types import Completion, Request, SamplingParams

Result = TypeVar("Result")

EMBEDDED = model_folder("embedded")
PYTHON = Path(__file__).parents[3] / ".venv-sglang" / "bin" / "python"
VOCAB = 418
CONTEXT = 1016
PATIENCE_S = 600.0


class PolicyWeights:
    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def save(self, folder: Path) -> None:
        self.policy.save_pretrained(folder)

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.policy.model.named_parameters())


def make_engine(
    policy: Policy,
    folder: Path,
    *,
    urls: Sequence[str] = (),
    transport: Transport = "disk",
    colocated: bool = False,
    hang_timeout_s: float = 20.0,
    python: Path = PYTHON,
) -> SGLangEngine:
    """An engine that launches one server in deterministic mode, or uses those of `urls`."""
    launch = ServerOptions(
        python=python,
        device="cpu",
        dtype="float32",
        context_tokens=1024,
        max_running_requests=96,
        max_cached_tokens=131_072,
        deterministic=True,
        colocated=colocated,
        seed=0,
        startup_timeout_s=180.0,
        hang_timeout_s=hang_timeout_s,
    )
    return SGLangEngine(
        PolicyWeights(policy),
        list(urls) or launch,
        SGLangOptions(VOCAB, CONTEXT, deterministic=True, transport=transport, colocated=colocated),
        LaneOptions(120.0, hang_timeout_s, 180.0, max_inflight_tokens=0),
        folder=folder,
    )


def serve(
    engine: SGLangEngine, work: Callable[[], Coroutine[None, None, Result]], version: int = 1
) -> Result:
    """Run `work` on an event loop of its own, with the policy's current weights served as `version`."""

    async def synced() -> Result:
        await engine.update_weights(version)
        try:
            return await work()
        finally:
            await engine.release()

    return asyncio.run(synced())


def embedded_chat() -> Chat:
    return Chat(PreTrainedTokenizerFast.from_pretrained(EMBEDDED), teach_loop=False)


def request(
    token_ids: Sequence[int] | np.ndarray,
    new: int = 12,
    *,
    key: int = 0,
    group: int = 0,
    seed: int = 0,
    temperature: float = 1.0,
    stop: tuple[int, ...] = (),
) -> Request:
    sampling = SamplingParams(new, temperature, stop)
    return Request(np.asarray(token_ids, np.int64), sampling, seed, key, group)


def prompt(length: int, seed: int) -> np.ndarray:
    """Random token ids [length]; the first few of a vocabulary are special."""
    return np.random.default_rng(seed).integers(10, VOCAB, length)


def trained_logprobs(policy: Policy, asked: Request, completion: Completion) -> np.ndarray:
    """Log-probs [N] of a completion under the trainer's own forward."""
    sequence = np.concatenate([asked.token_ids, completion.token_ids])
    trained = np.arange(len(sequence)) >= len(asked.token_ids)
    with torch.no_grad():
        logprobs = policy.logprobs(
            pack_forest([sequence], [trained]), temperature=asked.sampling.temperature or 1.0
        )
    return logprobs[torch.from_numpy(trained)].numpy()


def script(folder: Path, text: str) -> Path:
    """An executable that is run in place of the server's Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
