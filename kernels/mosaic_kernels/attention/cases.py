"""Compile cases of the attention kernels: each kernel at each entry of the tile table."""

from collections.abc import Iterator

import torch
import triton

from mosaic_kernels.attention import kernels
from mosaic_kernels.attention.tiles import HALF, SINGLE, TF32, Tile, Tiles
from mosaic_kernels.attention.triton import DELTA_BLOCK
from mosaic_kernels.compile_case import CompileCase, short_name

INT, STATISTIC = torch.int32, torch.float32
SIZES = (4097, 4097, 8, 100, 0.125)  # queries, keys, heads, window, scale
GROUP = 4


def compile_cases() -> Iterator[CompileCase]:
    """bf16 with and without a window, fp16 without; fp32 as IEEE and as TF32."""
    for (arch, head_dim), tiles in HALF.items():
        yield from _cases(arch, head_dim, tiles, torch.bfloat16, window=False)
        if head_dim in (96, 128):  # where models with sliding windows are (Phi-3, Mistral)
            yield from _cases(arch, head_dim, tiles, torch.bfloat16, window=True)
        yield from _cases(arch, head_dim, tiles, torch.float16, window=False)
    for table, precision in ((SINGLE, "ieee"), (TF32, "tf32")):
        for (arch, head_dim), tiles in table.items():
            yield from _cases(arch, head_dim, tiles, torch.float32, window=False, precision=precision)


def _cases(
    arch: str, head_dim: int, tiles: Tiles, dtype: torch.dtype, *, window: bool, precision: str = "ieee"
) -> Iterator[CompileCase]:
    label = " ".join(
        [
            "tf32" if precision == "tf32" else short_name(dtype),
            f"D{head_dim}",
            *(["window"] if window else []),
        ]
    )
    strides = (head_dim * 32, head_dim)
    indices = (INT,) * 6  # end, rows, depth, row_depth, work, blocks
    shared: dict[str, int | bool | str] = {"D": head_dim, "BLOCK_D": int(triton.next_power_of_2(head_dim))}

    def case(
        name: str, tile: Tile, arguments: tuple[torch.dtype | int | float, ...], **constants: int | bool | str
    ) -> CompileCase:
        return CompileCase(
            op="tree_attention", name=f"{name} {label}", arch=arch, kernel=getattr(kernels, f"{name}_kernel"),
            arguments=arguments, constants={**shared, **constants},
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            tensor_cores=name != "delta" and not (dtype == torch.float32 and precision == "ieee"),
        )  # fmt: skip

    def blocks(tile: Tile) -> dict[str, int | bool | str]:
        return {
            "GROUP": GROUP, "WINDOW": window, "PRECISION": precision,
            "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k,
        }  # fmt: skip

    tile = tiles.forward
    yield case("forward", tile, (dtype,) * 4 + (STATISTIC, *indices, *SIZES, *strides * 3), **blocks(tile))
    backward = ((dtype,) * 4 + (STATISTIC,) * 2, (*indices, *SIZES, *strides * 4))
    yield case("dq", tiles.dq, (*backward[0], dtype, *backward[1]), **blocks(tiles.dq))
    yield case("dkv", tiles.dkv, (*backward[0], dtype, dtype, *backward[1]), **blocks(tiles.dkv))
    if not window and precision == "ieee":
        delta = Tile(DELTA_BLOCK, 0, 4, 3)
        yield case("delta", delta, (dtype, dtype, STATISTIC, 4097, 8, *strides), BLOCK_Q=DELTA_BLOCK)
