"""What the ops share: choosing a backend, and taking index arguments as torch or numpy. Imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

logger = logging.getLogger("mosaic_kernels")

IndexLike = torch.Tensor | NDArray[np.generic]

Backends = Mapping[str, tuple[str, ...] | None]  # name -> device types it runs on, None for all
Defaults = Mapping[str, tuple[str, ...]]  # device type -> what `auto` takes there, the best one first


def emulated() -> bool:
    """Whether Triton kernels are executed on the CPU: by Triton's interpreter or ttsem (docs/kernels.md)."""
    return os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("MOSAIC_EMULATED") == "1"


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the thread's current one, which in a new thread is the first."""
    return nullcontext() if emulated() or device.type != "cuda" else torch.cuda.device(device)


def launch(kernel: Any, programs: int, *arguments: object, **constants: object) -> None:
    """Run a Triton kernel on the device of its first tensor. Every launch of ours goes through here.

    Triton launches on the current device of the thread, whatever device the tensors are on.
    """
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    with device_guard(device):
        kernel[(programs,)](*arguments, **constants)


def choose_backend(
    op: str,
    requested: str,
    device: torch.device,
    backends: Backends,
    defaults: Defaults,
    obstacle: Callable[[str], str] = lambda name: "",
) -> str:
    """The backend to run. `auto` takes the first default of the device type that has no obstacle.

    obstacle: what keeps a backend from computing this call, "" for nothing; the last default has none.
    ValueError names the backends that exist. The choice is logged once for each op, device type and obstacle:
    as a warning where `auto` does not get the best one.
    """
    if requested == "auto":
        obstacles = []
        for name in defaults.get(device.type, ("reference",)):
            missing = "" if name != "triton" or installed("triton") else "the package triton is not installed"
            if not (why := missing or obstacle(name)):
                break
            obstacles.append(f"{name}: {why}")
        _log_choice(op, name, requested, device.type, "; ".join(obstacles))
        return name
    usable = [
        name
        for name, devices in backends.items()
        if devices is None or device.type in devices or (name == "triton" and emulated())
    ]
    if requested not in usable:
        if requested in backends:
            problem = f"backend={requested!r} does not run on {device.type}"
        else:
            problem = f"unknown backend {requested!r}"
        raise ValueError(
            f"{op}: {problem}; available on {device.type} are 'auto', {', '.join(map(repr, usable))}"
        )
    if requested == "triton" and not installed("triton"):
        raise ValueError(
            f"{op}: backend='triton' needs the package triton (pip install triton), which is not installed; "
            "backend='reference' does without"
        )
    _log_choice(op, requested, requested, device.type, "")
    return requested


@functools.cache
def installed(package: str) -> bool:
    """Whether a package can be imported; looked for once."""
    return importlib.util.find_spec(package) is not None


@functools.lru_cache(maxsize=256)
def _log_choice(op: str, chosen: str, requested: str, device_type: str, obstacles: str) -> None:
    if obstacles:
        logger.warning(
            "%s: backend %s on %s, which is slower, because of %s", op, chosen, device_type, obstacles
        )
    else:
        logger.info("%s: backend %s on %s (requested %s)", op, chosen, device_type, requested)


def as_index(name: str, value: IndexLike, device: torch.device, *, below: int | None = None) -> torch.Tensor:
    """An index argument as an int64 tensor on the device, each value in [0, below).

    The range is checked before the transfer, so values already on an accelerator cost no synchronisation
    and are not checked.
    """
    tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.is_complex():
        raise ValueError(f"{name} must hold integers, got {tensor.dtype}")
    if below is not None and tensor.device.type == "cpu" and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= below:
            raise ValueError(f"{name} holds {low if low < 0 else high}, outside [0, {below})")
    return tensor.to(device=device, dtype=torch.int64)


def result_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp64 if any input is fp64, else fp32: what losses and log-probs are computed and returned in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
