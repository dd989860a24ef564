"""What the ops share: choosing a backend, and taking index arguments as torch or numpy. Imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

logger = logging.getLogger("mosaic_kernels")

IndexLike = torch.Tensor | NDArray[np.generic]

Backends = Mapping[str, tuple[str, ...] | None]  # name -> device types it runs on, None for all


def emulated() -> bool:
    """Whether Triton kernels are executed on the CPU: by Triton's interpreter or ttsem (docs/kernels.md)."""
    return os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("MOSAIC_EMULATED") == "1"


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' own."""
    return nullcontext() if emulated() or device.type != "cuda" else torch.cuda.device(device)


def choose_backend(
    op: str, requested: str, device: torch.device, backends: Backends, defaults: Mapping[str, str]
) -> str:
    """The backend to run. `auto` takes the default of the device type, else `reference`.

    ValueError names the backends that exist. The choice is logged once for each op and device type.
    """
    usable = [
        name
        for name, devices in backends.items()
        if devices is None or device.type in devices or (name == "triton" and emulated())
    ]
    chosen = defaults.get(device.type, "reference") if requested == "auto" else requested
    if chosen not in usable:
        if chosen in backends:
            problem = f"backend={chosen!r} does not run on {device.type}"
        else:
            problem = f"unknown backend {chosen!r}"
        raise ValueError(
            f"{op}: {problem}; available on {device.type} are 'auto', {', '.join(map(repr, usable))}"
        )
    if chosen == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"{op}: backend='triton' needs the package triton (pip install triton), which is not installed; "
            "backend='reference' does without"
        )
    _log_choice(op, chosen, requested, device.type)
    return chosen


@functools.lru_cache(maxsize=256)
def _log_choice(op: str, chosen: str, requested: str, device_type: str) -> None:
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
