"""TRL's steps as contenders: one process in .venv-trl, which `make bench-peers` makes. CPU, fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
import peer
import torch
from agreement import Expected, Missing
from peer import ROOT, Peer, batch_folder
from torch import Tensor
from workloads import Workload

PYTHON = ROOT / ".venv-trl" / "bin" / "python"


def installed() -> bool:
    return (ROOT / ".venv-trl" / ".installed").exists()


@functools.lru_cache(maxsize=2)
def _peer(threads: int, shared: bool) -> Peer:
    """Importing TRL takes seconds, so one process serves all variants of a run, and one the shared ones."""
    return Peer(PYTHON, "trl_step.py", str(threads), *(["shared"] if shared else []))


def join(
    contenders: dict[str, Callable[[], object]],
    stack: ExitStack,
    loaded: AbstractContextManager[Peer],  # grpo(...) or dpo(...)
    expected: Expected,
) -> Missing:
    """`peer.join` as `trl`; nothing where TRL is not installed."""
    return peer.join("trl", contenders, stack, loaded, expected) if installed() else {}


@contextmanager
def grpo(workload: Workload, weights: Tensor, *, shared: bool = False) -> Iterator[Peer]:
    """GRPOTrainer with the loss -sum(advantage x ratio) / T; the advantages are per token, -weights [T].

    shared: with prefixes shared by mosaic_fast.integrations.trl, here and below.
    """
    prompt = max(1, min(int(mask.argmax()) for mask in workload.trained if mask.any()))
    with _loaded("grpo", workload, shared, prompt=prompt, weights=weights.numpy()) as found:
        yield found


@contextmanager
def dpo(
    workload: Workload, pairs: np.ndarray, reference: np.ndarray, beta: float, *, shared: bool = False
) -> Iterator[Peer]:
    """DPOTrainer, the first of each pair chosen. pairs: [P, 2]; reference: [R] summed log-probs."""
    arrays = {"pairs": pairs, "reference": reference.astype(np.float32), "beta": beta}
    with _loaded("dpo", workload, shared, **arrays) as found:
        yield found


@contextmanager
def sft(workload: Workload, *, shared: bool = False) -> Iterator[Peer]:
    """SFTTrainer with the mean negative log-prob of the trained tokens."""
    with _loaded("sft", workload, shared) as found:
        yield found


@contextmanager
def _loaded(kind: str, workload: Workload, shared: bool, **arrays: np.ndarray | float) -> Iterator[Peer]:
    with batch_folder(workload, **arrays) as folder:
        found = _peer(torch.get_num_threads(), shared)
        found.load(kind, folder)
        yield found
