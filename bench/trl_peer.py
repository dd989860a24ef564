"""TRL's trainer steps as contenders: one process in .venv-peers, which `make bench-peers` makes."""

from __future__ import annotations

import atexit
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from contenders import check_same
from safetensors.torch import load_file
from torch import Tensor
from workloads import Workload

from mosaic_fast.policy.checkpoint import save_model

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SCRIPT = Path(__file__).parent / "peers" / "trl_step.py"


class PeerError(RuntimeError):
    """The peer's process ended early; holds the end of what it said."""


def installed() -> bool:
    return (ROOT / ".venv-peers" / ".installed").exists()


class Peer:
    """TRL's process, with one trainer and its batch loaded at a time. It waits while others are timed."""

    def __init__(self, threads: int) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="trl-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(PYTHON), str(SCRIPT), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self._folder = Path()
        atexit.register(self._process.kill)

    def load(self, kind: str, folder: Path) -> None:
        self._folder = folder
        self._ask(f"load {kind} {folder}")

    def gradients(self) -> dict[str, Tensor]:
        """Of its loss, by parameter name."""
        self._ask("gradients")
        return load_file(self._folder / "gradients.safetensors")

    def step(self) -> float:
        """One forward, backward and AdamW; the seconds it took in its own process."""
        return float(self._ask("step"))

    def _ask(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            said = Path(self._log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise PeerError(f"{SCRIPT.name} ended: " + "\n".join(said[-3:]))
        return answer.strip()


@functools.lru_cache(maxsize=1)
def _peer(threads: int) -> Peer:
    """Importing TRL takes seconds, so one process serves all variants of a run."""
    return Peer(threads)


def join(
    contenders: dict[str, Callable[[], object]],
    stack: ExitStack,  # TRL's batch stays loaded until it is left
    loaded: AbstractContextManager[Peer],  # grpo(...) or dpo(...)
    expected: Mapping[str, Tensor],  # gradients by parameter name
) -> dict[str, str]:
    """Make TRL's step a contender, `trl`; returns {"TRL": why} where it does not run here.

    AssertionError if its gradients are not the expected ones.
    """
    if not installed():
        return {}
    try:
        peer = stack.enter_context(loaded)
        found = peer.gradients()
    except PeerError as error:
        return {"TRL": str(error)}
    check_same("trl", found, expected)
    contenders["trl"] = peer.step
    return {}


@contextmanager
def grpo(workload: Workload, weights: Tensor) -> Iterator[Peer]:
    """GRPOTrainer with the loss -sum(advantage x ratio) / T; the advantages are per token, -weights [T]."""
    prompt = max(1, min(int(mask.argmax()) for mask in workload.trained if mask.any()))
    with _loaded("grpo", workload, prompt=prompt, weights=weights.numpy()) as peer:
        yield peer


@contextmanager
def dpo(workload: Workload, pairs: np.ndarray, reference: np.ndarray, beta: float) -> Iterator[Peer]:
    """DPOTrainer, the first of each pair chosen. pairs: [P, 2]; reference: [R] summed log-probs."""
    with _loaded("dpo", workload, pairs=pairs, reference=reference.astype(np.float32), beta=beta) as peer:
        yield peer


@contextmanager
def _loaded(kind: str, workload: Workload, **arrays: np.ndarray | float) -> Iterator[Peer]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(workload.model, folder)
        for key, value in {
            "tokens": np.concatenate(workload.sequences),
            "trained": np.concatenate(workload.trained),
            "cu_seqlens": np.cumsum([0, *(len(s) for s in workload.sequences)]),
            **arrays,
        }.items():
            np.save(folder / f"{key}.npy", value)
        peer = _peer(torch.get_num_threads())
        peer.load(kind, folder)
        yield peer
