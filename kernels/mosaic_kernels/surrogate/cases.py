"""Compile cases of the surrogate's kernel."""

from collections.abc import Iterator

import torch

from mosaic_kernels.compile_case import CompileCase
from mosaic_kernels.dispatch import ARCHITECTURES
from mosaic_kernels.surrogate.triton import BLOCK, surrogate_kernel


def compile_cases() -> Iterator[CompileCase]:
    for arch in ARCHITECTURES:
        yield CompileCase(
            op="clipped_surrogate", name="KL", arch=arch, kernel=surrogate_kernel,
            arguments=(*(torch.float32,) * 7, 1001, 0.75, 1.25, 0.5), constants={"BLOCK": BLOCK, "KL": True},
            tensor_cores=False,
        )  # fmt: skip
