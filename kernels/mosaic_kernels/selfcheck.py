"""The self-check: before its first use on a device, a Triton op proves itself against the reference there.

The kernels were compiled and emulated, and the user's GPU may be the first to run them. So an op runs once on
a small random problem of the same dtype and shape class, forward and backward, and refuses to go on if any
result is off.
"""

import functools
import logging
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from mosaic_kernels.dispatch import device_guard, emulated

logger = logging.getLogger("mosaic_kernels")


@dataclass(frozen=True)
class Deviation:
    """How far one result is from the fp64 reference, and how far it may be."""

    error: float
    limit: float


FORWARD, BACKWARD = 2.0, 3.0  # times the error of plain PyTorch in the same dtype
FLOORS = {
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}  # 8 epsilons, and 1 of the short ones


def deviations_of(
    results: Mapping[str, torch.Tensor],  # of the op in question
    plain: Mapping[str, torch.Tensor],  # of plain PyTorch in the same dtype
    exact: Mapping[str, torch.Tensor],  # in fp64
    dtype: torch.dtype,  # of the op's inputs
) -> dict[str, Deviation]:
    """The project's criterion, in 2-norms: error <= 2 (gradients, named "d...": 3) times plain's + a floor.

    The floor is relative to the result's norm, or to the largest gradient's norm: gradients that cancel to
    nothing leave rounding, which is relative to their terms. Results that are not finite are off.
    """
    norms = {name: float(x.detach().double().norm()) for name, x in exact.items()}
    largest_gradient = max((norm for name, norm in norms.items() if name.startswith("d")), default=0.0)

    def distance(x: torch.Tensor, name: str) -> float:
        x = x.detach().double().to(exact[name].device)
        if x.shape != exact[name].shape or not bool(torch.isfinite(x).all()):
            return float("inf")
        return float((x - exact[name].detach().double()).norm())

    found = {}
    for name, result in results.items():
        gradient = name.startswith("d")
        scale = largest_gradient if gradient else norms[name]
        factor = BACKWARD if gradient else FORWARD
        limit = factor * distance(plain[name], name) + FLOORS[dtype] * scale
        unit = scale or 1.0
        found[name] = Deviation(distance(result, name) / unit, limit / unit)
    return found


class KernelMismatch(RuntimeError):
    """A Triton kernel computes something else on this device than the reference does."""


Variant = Hashable
# (device, variant) -> how far each result ("out", "dq") is off
Check = Callable[[torch.device, Variant], Mapping[str, Deviation]]


def check_once(op: str, device: torch.device, variant: Variant, check: Check) -> None:
    """Run `check` the first time this (op, device, variant) is seen; KernelMismatch if a result is off.

    `variant` is what compiles to different code, for example (torch.bfloat16, 128). `check` is a function at
    module level (it is part of the key) that calls the kernels below the place where check_once is called.
    Under an emulator nothing is checked: there the tests are the check.
    """
    if device.type == "cuda" and not emulated():
        run_check(op, device, variant, check)


@functools.lru_cache(maxsize=256)  # a check that raises is not remembered, so it raises again
def run_check(op: str, device: torch.device, variant: Variant, check: Check) -> None:
    """`check_once` on whatever device is given."""

    # In a thread of its own: what may surround an op's first call is local to a thread, and not the check's
    # business (saved-tensor hooks of activation checkpointing, autocast, inference mode, a side stream).
    # The current device is local to a thread, too.
    def on_its_device() -> Mapping[str, Deviation]:
        with device_guard(device):
            return check(device, variant)

    with ThreadPoolExecutor(max_workers=1) as thread:
        deviations = thread.submit(on_its_device).result()
    listed = ", ".join(f"{name} {d.error:.1e} (limit {d.limit:.1e})" for name, d in deviations.items())
    off = [name for name, d in deviations.items() if not d.error <= d.limit]  # `not <=` also catches a NaN
    if off:
        raise KernelMismatch(
            f"{op}: the Triton kernel for {variant} fails its self-check on {device}: "
            f"{', '.join(off)} off; errors: {listed}. "
            "Choose another backend by name, for example backend='reference' (in a run model.attention, "
            "model.lm_head or loss.backend), and report this line."
        )
    logger.info("%s: self-check of the Triton kernel for %s on %s passed: %s", op, variant, device, listed)
