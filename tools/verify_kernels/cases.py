"""What every kernel must compile to, declared: one case for each kernel, tile and architecture."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, product

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mosaic_kernels.attention import kernels as attention_kernels
from mosaic_kernels.attention import tiles as attention_tiles
from mosaic_kernels.attention.triton import DELTA_BLOCK, delta_warps, padded_size
from mosaic_kernels.gather_sum import gather_sum_kernel
from mosaic_kernels.logprob import kernels as logprob_kernels
from mosaic_kernels.logprob import tiles as logprob_tiles
from mosaic_kernels.logprob.triton import BLOCK as ROW_BLOCK
from mosaic_kernels.preference import kernels as preference_kernels
from mosaic_kernels.preference.triton import LANES, TOKEN_BLOCK
from mosaic_kernels.surrogate.triton import BLOCK as SURROGATE_BLOCK
from mosaic_kernels.surrogate.triton import surrogate_kernel

FP32, INT, LONG, BYTE = torch.float32, torch.int32, torch.int64, torch.uint8
SHORT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

ATTENTION_SIZES = (4097, 4097, 8, 0.125, 50.0)  # queries, keys, heads, scale, softcap
GROUP = 4  # query heads a key head
OTHER_GROUPS = (1, 2, 5, 7, 8)
ASSERTED_SIZES = (
    64,
    96,
    128,
    256,
)  # head sizes of tiles whose loops are held to what a tile takes, in 16 bits
EDGES = (INT,) * 4  # rows, targets, tile_edges, tile_starts
ROWS, VOCAB, DIM, CHUNK = 1001, 151_667, 5120, 8192


@dataclass(frozen=True)
class Architecture:
    """Limits of one streaming multiprocessor (compute unit), from the vendors' tuning guides."""

    target: GPUTarget
    block_shared_bytes: int  # the most one block can ask for
    shared_bytes: int
    warps: int
    registers: int  # 32-bit; for AMD those of one SIMD's lane, 512
    matrix_instructions: str  # of which one must occur in a kernel with dots on 16-bit types


KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB, 64, 65536, r"\bHMMA"),
    "sm_86": Architecture(GPUTarget("cuda", 86, 32), 99 * KIB, 100 * KIB, 48, 65536, r"\bHMMA"),
    "sm_89": Architecture(GPUTarget("cuda", 89, 32), 99 * KIB, 100 * KIB, 48, 65536, r"\bHMMA"),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB, 64, 65536, r"\bHG?MMA"),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB, 64, 65536, r"\b(?:UTC\w*|H)MMA"),
    "sm_120": Architecture(GPUTarget("cuda", 120, 32), 99 * KIB, 100 * KIB, 48, 65536, r"\bHMMA"),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 32, 512, r"\bv_mfma"),
}


@dataclass(frozen=True)
class TileWork:
    """What a loop has to do for each of its tiles, in all threads of a block together."""

    multiply_adds: int
    exponentials: int


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
    arch: str  # "sm_90", "gfx942": a key of ARCHITECTURES
    kernel: JITFunction[Callable[..., None]]
    arguments: tuple[torch.dtype | int | float, ...]
    constants: Mapping[str, int | bool | str] = field(default_factory=dict)  # constexpr arguments
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = True  # whether its dots must compile to tensor-core instructions
    tile_work: TileWork | None = None  # of each loop of the machine code
    asserted: bool = False  # whether the loops are held to that


@dataclass(frozen=True)
class Bends:
    """What a family of models adds to plain attention, as the kernels are compiled for it."""

    window: bool = False  # or a chunk
    softcap: bool = False
    sinks: bool = False
    head_dims: tuple[int, int] | None = None  # of keys and of values, where the tile is of a larger size


PLAIN = Bends()
BENDS = {  # head size of the tile -> what models of that size have
    64: (Bends(window=True), Bends(window=True, sinks=True)),  # gpt-oss
    96: (Bends(window=True),),  # Phi-3
    128: (Bends(window=True), Bends(softcap=True)),  # Mistral, Gemma 2 27B
    256: (Bends(window=True, softcap=True), Bends(head_dims=(192, 128))),  # Gemma 2, DeepSeek
}


# Products with the size of keys, and with that of values, of each score of a loop's tile.
PRODUCTS_OF_LOOPS = {"forward": (1, 1), "dq": (2, 1), "dkv": (2, 2), "dk": (2, 1), "dv": (1, 1)}
# Loops that still multiply more than their tile, wait for copies with none ahead, or use slower products:
# (architecture, head size of the tile) -> kernels.
TO_MEND = {(arch, 256): ("forward", "dq", "dkv") for arch in ("sm_80", "sm_86", "sm_89", "sm_120")}


def all_cases(arch: str | None = None, holding: str = "", *, groups: bool = False) -> list[CompileCase]:
    """The cases of every op, in a fixed order; of one architecture, with this text in their names.

    groups: instead, attention's loops for other numbers of heads a group.
    """
    ops = chain(attention_cases(), logprob_cases(), preference_cases(), surrogate_cases())
    made = attention_group_cases() if groups else ops
    return [case for case in made if arch in (None, case.arch) and holding in case.name]


def attention_cases() -> Iterator[CompileCase]:
    """Each kernel at each entry of the tile table: bf16 plain and as models of that size bend it, fp16 plain.

    fp32 as IEEE and as TF32.
    """
    for arch, head_dim in attention_tiles.HALF:
        tiles = attention_tiles.tiles_for(arch, head_dim, torch.bfloat16)
        yield from attention_tile_cases(arch, head_dim, tiles, torch.bfloat16)
        for bends in BENDS.get(head_dim, ()):
            own = attention_tiles.tiles_for(arch, head_dim, torch.bfloat16, bent=True)
            yield from attention_tile_cases(arch, head_dim, own, torch.bfloat16, bends)
        yield from attention_tile_cases(arch, head_dim, tiles, torch.float16)
    for table, precision in ((attention_tiles.SINGLE, "ieee"), (attention_tiles.TF32, "tf32")):
        for (arch, head_dim), tiles in table.items():
            yield from attention_tile_cases(arch, head_dim, tiles, torch.float32, precision=precision)


def attention_group_cases() -> Iterator[CompileCase]:
    """bf16 and fp16, with and without a window; dK/dV, which loops over a group's heads, for each group.

    For the other kernels the group is no more than a divisor in an address.
    """
    for arch, head_dim in attention_tiles.HALF:
        if head_dim not in ASSERTED_SIZES:
            continue
        for dtype, window in product((torch.bfloat16, torch.float16), (False, True)):
            for group in (GROUP, *OTHER_GROUPS):
                own = attention_tiles.tiles_for(arch, head_dim, dtype, bent=window or group == 1)
                made = attention_tile_cases(arch, head_dim, own, dtype, Bends(window=window), group=group)
                yield from (
                    case for case in made if group == GROUP or case.kernel is attention_kernels.dkv_kernel
                )


def attention_tile_cases(
    arch: str,
    head_dim: int,
    tiles: attention_tiles.Tiles,
    dtype: torch.dtype,
    bends: Bends = PLAIN,
    *,
    group: int = GROUP,  # query heads a key head
    precision: str = "ieee",
) -> Iterator[CompileCase]:
    asserted = () if dtype == FP32 or head_dim not in ASSERTED_SIZES else PRODUCTS_OF_LOOPS
    asserted = [name for name in asserted if name not in TO_MEND.get((arch, head_dim), ())]
    head_dim, value_dim = bends.head_dims or (head_dim, head_dim)
    label = " ".join(
        [
            "tf32" if precision == "tf32" else SHORT_NAMES[dtype],
            f"D{head_dim}",
            *([f"V{value_dim}"] if value_dim != head_dim else []),
            *(name for name in ("window", "softcap", "sinks") if getattr(bends, name)),
            *([f"group {group}"] if group != GROUP else []),
        ]
    )
    strides, value_strides = ((size * 32, size) for size in (head_dim, value_dim))
    indices = (INT,) * 6  # end, rows, limit, row_depth, work, blocks

    def case(
        name: str,
        tile: attention_tiles.Tile,
        arguments: tuple[torch.dtype | int | float, ...],
        **constants: int | bool | str,
    ) -> CompileCase:
        return CompileCase(
            op="tree_attention", name=f"{name} {label}", arch=arch,
            kernel=getattr(attention_kernels, "dkv_kernel" if name in ("dk", "dv") else f"{name}_kernel"),
            arguments=arguments, constants={"V": value_dim, "BLOCK_V": padded_size(value_dim), **constants},
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            tensor_cores=name != "delta" and not (dtype == torch.float32 and precision == "ieee"),
            tile_work=tile_work(name, tile) if dtype != FP32 and name in PRODUCTS_OF_LOOPS else None,
            asserted=name in asserted,
        )  # fmt: skip

    def tile_work(name: str, tile: attention_tiles.Tile) -> TileWork:
        of_keys, of_values = PRODUCTS_OF_LOOPS[name]
        scores = tile.block_q * tile.block_k
        columns = of_keys * padded_size(head_dim) + of_values * padded_size(value_dim)
        return TileWork(scores * columns, scores * (1 + bends.softcap))

    def blocks(tile: attention_tiles.Tile) -> dict[str, int | bool | str]:
        return {
            "GROUP": group, "LIMIT": bends.window, "SOFTCAP": bends.softcap, "PRECISION": precision,
            "D": head_dim, "BLOCK_D": padded_size(head_dim),
            "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k,
        }  # fmt: skip

    tile = tiles.forward
    yield case(
        "forward", tile,
        (dtype, dtype, dtype, FP32, dtype, FP32, *indices, *ATTENTION_SIZES, *strides * 2, *value_strides),
        **blocks(tile), SINKS=bends.sinks,
    )  # fmt: skip
    if bends.sinks:  # the forward kernel's alone
        return
    sizes = (*indices, *ATTENTION_SIZES, *strides * 2, *value_strides * 2)
    backward = ((dtype,) * 4 + (FP32,) * 2, sizes)
    yield case("dq", tiles.dq, (*backward[0], dtype, *backward[1]), **blocks(tiles.dq))
    for name in ("dk", "dv") if tiles.apart else ("dkv",):
        yield case(
            name, tiles.dkv, (*backward[0], dtype, dtype, *backward[1]),
            **blocks(tiles.dkv), KEYS=name != "dv", VALUES=name != "dk",
        )  # fmt: skip
    if precision == "ieee" and not (bends.window or bends.softcap):
        delta = attention_tiles.Tile(DELTA_BLOCK, 0, delta_warps(value_dim), 3)
        yield case("delta", delta, (dtype, dtype, FP32, 4097, 8, *value_strides), BLOCK_Q=DELTA_BLOCK)


def logprob_cases() -> Iterator[CompileCase]:
    """Each kernel at each entry of the tile table: bf16 with everything and with nothing, fp16 with nothing.

    Everything is entropy, bias and softcap. fp32 as IEEE and as TF32, with everything.
    """
    for (arch, few), tiles in logprob_tiles.HALF.items():
        yield from _logprob_tile_cases(arch, few, tiles, torch.bfloat16, full=True)
        yield from _logprob_tile_cases(arch, few, tiles, torch.bfloat16, full=False)
        yield from _logprob_tile_cases(arch, few, tiles, torch.float16, full=False)
    for (arch, few), tiles in logprob_tiles.SINGLE.items():
        if not few:  # the same tile
            yield from _logprob_tile_cases(arch, few, tiles, torch.float32, full=True)
            yield from _logprob_tile_cases(arch, few, tiles, torch.float32, full=True, precision="tf32")
            yield from _logprob_row_cases(arch)


def _logprob_tile_cases(
    arch: str,
    few: bool,
    tiles: logprob_tiles.Tiles,
    dtype: torch.dtype,
    *,
    full: bool,
    precision: str = "ieee",
) -> Iterator[CompileCase]:
    label = " ".join(
        [
            "tf32" if precision == "tf32" else SHORT_NAMES[dtype],
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
            op="linear_logprob", name=f"{name} {label}", arch=arch,
            kernel=getattr(logprob_kernels, f"{name}_kernel"),
            arguments=sizes[name],
            constants={
                "D": DIM, "BLOCK_ROWS": tile.rows, "BLOCK_VOCAB": tile.vocab, "BLOCK_DIM": tile.dim,
                "PRECISION": precision, **flags,
            },
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            tensor_cores=dtype != torch.float32 or precision == "tf32",
        )  # fmt: skip


def _logprob_row_cases(arch: str) -> Iterator[CompileCase]:
    """The kernels that only touch a number a row; dtype and tile do not matter."""
    yield CompileCase(
        op="linear_logprob", name="merge entropy", arch=arch, kernel=logprob_kernels.merge_kernel,
        arguments=(*(FP32,) * 6, ROWS, 5),
        constants={"BLOCK": ROW_BLOCK, "ENTROPY": True}, tensor_cores=False,
    )  # fmt: skip
    yield CompileCase(
        op="linear_logprob", name="row gradient", arch=arch, kernel=gather_sum_kernel,
        arguments=(FP32, INT, INT, FP32, ROWS), constants={"BLOCK": ROW_BLOCK}, tensor_cores=False,
    )  # fmt: skip


def preference_cases() -> Iterator[CompileCase]:
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
                op="preference_loss", name=name, arch=arch,
            kernel=getattr(preference_kernels, f"{name}_kernel"),
                arguments=arguments, constants=constants, tensor_cores=False,
            )  # fmt: skip


def surrogate_cases() -> Iterator[CompileCase]:
    for arch in ARCHITECTURES:
        yield CompileCase(
            op="clipped_surrogate", name="KL", arch=arch, kernel=surrogate_kernel,
            arguments=(*(torch.float32,) * 7, 1001, 0.75, 1.25, 0.5),
            constants={"BLOCK": SURROGATE_BLOCK, "KL": True},
            tensor_cores=False,
        )  # fmt: skip
