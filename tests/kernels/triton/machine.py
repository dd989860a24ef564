"""What executes Triton kernels in this process, and what it can be asked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    name: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]  # those it computes right
    examples: int  # random forests a property test affords
    max_length: int  # tokens of a drawn rollout: ttsem checks races up to 4 million accesses a launch


INTERPRETER = Machine(
    # Its arithmetic on bf16 is on the bit patterns, silently: not asked.
    "interpreter", torch.device("cpu"), (torch.float32, torch.float16), examples=12, max_length=48
)  # fmt: skip
TTSEM = Machine(
    "ttsem", torch.device("cpu"), (torch.float32, torch.bfloat16, torch.float16), examples=8, max_length=20
)
DEVICE = Machine(
    "device",
    torch.device("cuda"),
    (torch.float32, torch.bfloat16, torch.float16),
    examples=40,
    max_length=300,
)


def _machine() -> Machine | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    if os.environ.get("MOSAIC_EMULATED") == "1":
        return TTSEM
    return DEVICE if torch.cuda.is_available() else None


MACHINE = _machine()


def machine() -> Machine:
    assert MACHINE is not None, "the conftest collects these tests only where there is one"
    return MACHINE


def on_machine(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """Copies on the machine's device: an emulated `.to` would alias."""
    return [x.detach().to(machine().device, copy=True) for x in tensors]
