"""Compile cases of the log-prob kernels: each kernel at each entry of the tile table."""

from collections.abc import Iterator

import torch

from mosaic_kernels.compile_case import CompileCase, short_name
from mosaic_kernels.dispatch import gather_sum_kernel
from mosaic_kernels.logprob import kernels
from mosaic_kernels.logprob.tiles import HALF, SINGLE, Tiles
from mosaic_kernels.logprob.triton import BLOCK

INT, FP32 = torch.int32, torch.float32
EDGES = (INT,) * 4  # rows, targets, tile_edges, tile_starts
ROWS, VOCAB, DIM, CHUNK = 1001, 151_667, 5120, 8192


def compile_cases() -> Iterator[CompileCase]:
    """bf16 with everything on (entropy, bias, softcap) and with nothing, fp16 with nothing; fp32, TF32."""
    for (arch, few), tiles in HALF.items():
        yield from _cases(arch, few, tiles, torch.bfloat16, full=True)
        yield from _cases(arch, few, tiles, torch.bfloat16, full=False)
        yield from _cases(arch, few, tiles, torch.float16, full=False)
    for (arch, few), tiles in SINGLE.items():
        if not few:  # the same tile
            yield from _cases(arch, few, tiles, torch.float32, full=True)
            yield from _cases(arch, few, tiles, torch.float32, full=True, precision="tf32")
            yield from _row_cases(arch)


def _cases(
    arch: str, few: bool, tiles: Tiles, dtype: torch.dtype, *, full: bool, precision: str = "ieee"
) -> Iterator[CompileCase]:
    label = " ".join(
        [
            "tf32" if precision == "tf32" else short_name(dtype),
            *(["few rows"] if few else []),
            *(["entropy bias softcap"] if full else []),
        ]
    )
    inputs = (dtype, dtype, FP32, *EDGES)
    sizes = {
        "forward": (*inputs, FP32, FP32, FP32, FP32, ROWS, VOCAB, 7, 1.25, 30.0),
        "backward": (*inputs, *(FP32,) * 7, dtype, ROWS, VOCAB, CHUNK, CHUNK, CHUNK, 1.25, 30.0),
    }
    for name, tile in (("forward", tiles.forward), ("backward", tiles.backward)):
        flags = {
            "ENTROPY": full,
            "BIAS": full,
            "SOFTCAP": full,
            **({"EDGES": True} if name == "backward" else {}),
        }
        yield CompileCase(
            op="linear_logprob", name=f"{name} {label}", arch=arch, kernel=getattr(kernels, f"{name}_kernel"),
            arguments=sizes[name],
            constants={
                "D": DIM, "BLOCK_ROWS": tile.rows, "BLOCK_VOCAB": tile.vocab, "BLOCK_DIM": tile.dim,
                "PRECISION": precision, **flags,
            },
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            tensor_cores=dtype != torch.float32 or precision == "tf32",
        )  # fmt: skip


def _row_cases(arch: str) -> Iterator[CompileCase]:
    """The kernels that only touch a number a row; dtype and tile do not matter."""
    yield CompileCase(
        op="linear_logprob", name="merge entropy", arch=arch, kernel=kernels.merge_kernel,
        arguments=(*(FP32,) * 6, ROWS, 5), constants={"BLOCK": BLOCK, "ENTROPY": True}, tensor_cores=False,
    )  # fmt: skip
    yield CompileCase(
        op="linear_logprob", name="row gradient", arch=arch, kernel=gather_sum_kernel,
        arguments=(FP32, INT, INT, FP32, ROWS), constants={"BLOCK": BLOCK}, tensor_cores=False,
    )  # fmt: skip
