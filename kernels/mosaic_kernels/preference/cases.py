"""Compile cases of the preference kernels."""

from collections.abc import Iterator

import torch

from mosaic_kernels.compile_case import CompileCase
from mosaic_kernels.dispatch import ARCHITECTURES
from mosaic_kernels.preference import kernels
from mosaic_kernels.preference.triton import LANES, TOKEN_BLOCK

FP32, INT, LONG, BYTE = torch.float32, torch.int32, torch.int64, torch.uint8


def compile_cases() -> Iterator[CompileCase]:
    for arch in ARCHITECTURES:
        for name, arguments, constants in (
            (
                "margin",
                (FP32, INT, FP32, BYTE, LONG, FP32),
                {"BLOCK": TOKEN_BLOCK, "EDGES": True, "REFERENCE": True},
            ),
            ("pair", (FP32, INT, FP32, FP32, FP32, 1001, 0.125), {"BLOCK": LANES}),
            (
                "margin_gradient",
                (FP32, FP32, INT, INT, BYTE, LONG, FP32),
                {"BLOCK": LANES, "TOKENS": True},
            ),
        ):
            yield CompileCase(
                op="preference_loss", name=name, arch=arch, kernel=getattr(kernels, f"{name}_kernel"),
                arguments=arguments, constants=constants, tensor_cores=False,
            )  # fmt: skip
