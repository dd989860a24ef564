"""Where a run measures: device, precision, whose sizes, and how time and memory are taken there."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Place:
    """A device with the precision and the sizes of what is measured on it."""

    device: torch.device
    dtype: torch.dtype  # of models and inputs
    real: bool  # sizes for an accelerator of 80 GB; False: those that two CPU cores run in minutes

    def randn(self, *shape: int, seed: int) -> Tensor:
        """Normal numbers in `dtype`, drawn on the device: on the same device always the same."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

    def randint(self, below: int, count: int, *, seed: int) -> Tensor:  # [count] int64
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randint(below, (count,), generator=generator, device=self.device)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def finished(self, work: Callable[[], object]) -> Callable[[], object]:
        """The same work, which returns when the device has done it: a call only queues CUDA kernels."""
        if self.device.type != "cuda":
            return work

        def run() -> object:
            found = work()
            torch.cuda.synchronize(self.device)
            return found

        return run

    def peak_gib(self, work: Callable[[], object]) -> float:
        """Most memory that PyTorch's allocator holds at a time during `work`, beyond what it held before."""
        if self.device.type != "cuda":
            return _cpu_peak_gib(work)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**30

    def release(self) -> None:
        """Give back what is no longer used, for the next case and for peers in processes of their own."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def precision(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]


CPU = Place(torch.device("cpu"), torch.float32, real=False)


def place_of(name: str) -> Place:
    """The place of --device. ValueError says what is wrong with the name."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {name}: name auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; leave it out, or name cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return CPU
    return Place(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, real=True)


@contextmanager
def without_chatter() -> Iterator[None]:
    """Silence the process's standard error, on which PyTorch's profiler announces itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _cpu_peak_gib(work: Callable[[], object]) -> float:
    """PyTorch keeps no such count on a CPU, so its profiler's allocations are added up."""
    with without_chatter(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # pyrefly: ignore [missing-attribute]  # torch's stub lacks it
        peak = max(peak, live)
    return peak / 2**30
