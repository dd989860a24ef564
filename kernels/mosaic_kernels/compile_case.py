"""What a kernel must compile to, declared: each op lists its launches in its `cases.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from triton.runtime.jit import JITFunction

SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class CompileCase:
    """One launch, to be compiled and not run.

    `arguments` stand for the kernel's runtime arguments in order: a torch dtype for a tensor of that dtype
    (its address a multiple of 16 bytes), an int or a float for a scalar. They are specialised as at a real
    launch: an int that is a multiple of 16 is compiled as such, unless the kernel says do_not_specialize. So
    give strides as the wrapper guarantees them, and sizes as odd as they may come.
    """

    op: str  # "tree_attention"
    name: str  # "forward bf16 D128": unique within op and arch
    arch: str  # "sm_90", "gfx942": a key of architectures.ARCHITECTURES
    kernel: JITFunction[Callable[..., None]]
    arguments: tuple[torch.dtype | int | float, ...]
    constants: Mapping[str, int | bool | str] = field(default_factory=dict)  # constexpr arguments
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = True  # whether its dots must compile to tensor-core instructions


def short_name(dtype: torch.dtype) -> str:
    return SHORT_NAMES[dtype]
