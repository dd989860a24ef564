"""What the figures were measured on, and the roofline of this machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from device import CPU, Place


@dataclass(frozen=True)
class Roofline:
    """The best this machine does with PyTorch's own operators, measured at start."""

    threads: int
    gemm_gflop_per_s: float  # the fastest of a few square matrix products; 2 n^3 operations each
    copy_gb_per_s: float  # bytes read and written by copying a tensor larger than the caches
    device: str = "cpu"
    precision: str = "fp32"  # of the matrix products

    def __str__(self) -> str:
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        return (
            f"roofline at {where}: {rate(self.gemm_gflop_per_s)} (matrix products), "
            f"{self.copy_gb_per_s:.1f} GB/s (copy), {self.precision}"
        )


def rate(gflop_per_s: float) -> str:
    """Example: 81 GFLOP/s, 612.4 TFLOP/s."""
    return f"{gflop_per_s:.0f} GFLOP/s" if gflop_per_s < 1e4 else f"{1e-3 * gflop_per_s:.1f} TFLOP/s"


def measure_roofline(threads: int, quick: bool = False, place: Place = CPU) -> Roofline:
    """Matrix products of 512, 1024 and 2048, and a copy of 256 MiB (quick: 512 and 64 MiB).

    With the sizes of an accelerator: products of 4096, 8192 and 16384, and a copy of 2 GiB.
    """
    sizes, copied = ((4096, 8192, 16384), 2**31) if place.real else ((512, 1024, 2048), 2**28)
    if quick:
        sizes, copied = sizes[:1], copied // 4
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gemm = 0.0
        for size in sizes:
            left, right = (place.randn(size, size, seed=seed) for seed in (0, 1))
            out = torch.empty_like(left)
            product = place.finished(lambda a=left, b=right, c=out: torch.mm(a, b, out=c))
            product()
            gemm = max(gemm, 2e-9 * size**3 / _shortest(product, 5))
        source = torch.ones(copied // 4, device=place.device)
        target = torch.empty_like(source)
        copy = place.finished(lambda: target.copy_(source))
        copy()
        copy_s = _median(copy, 5)
        return Roofline(threads, gemm, 2e-9 * source.nbytes / copy_s, place.device.type, place.precision)
    finally:
        torch.set_num_threads(before)


def _times(work: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def _shortest(work: Callable[[], object], rounds: int) -> float:
    return min(_times(work, rounds))


def _median(work: Callable[[], object], rounds: int) -> float:
    return statistics.median(_times(work, rounds))


def machine() -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "numpy", "mosaic-fast")}
    return {"python": platform.python_version(), **packages}


def commit() -> str | None:
    """The commit of this checkout, with "+" where files have been changed; None where git does not know."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        folder = Path(__file__).parent
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    found = git("rev-parse", "HEAD")
    return f"{found}+" if found and git("status", "--porcelain") else found or None
