"""The tile table of the Triton kernels: block sizes, warps and stages by (architecture, head size, dtype).

Every entry compiles without spills, within shared memory and to tensor-core instructions
(`python -m tools.verify_kernels --layer compile`; docs/lab/compiled.md). What has no such entry is absent.

In 16 bits, from head size 64 on, a loop multiplies its tile once. Triton lays the warps of a loop out by the
sides of its accumulator, along the rows (queries; keys in dK/dV) or along the head, and all products of the
loop follow. So tiles have at least 16 rows a warp (sm_90) or 8 columns of scores a warp (other NVIDIA): with
fewer, warps compute the same scores. Three stages keep the next block's copies in flight while one is used.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from mosaic_kernels.dispatch import emulated


@dataclass(frozen=True)
class Tile:
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


Sides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Tiles:
    """One tile for each kernel."""

    forward: Tile
    dq: Tile
    dkv: Tile
    apart: bool = False  # dK in one pass, dV in another: sums of both would not fit into registers


def _tiles(forward: Sides, dq: Sides, dkv: Sides, *, apart: bool = False) -> Tiles:
    return Tiles(Tile(*forward), Tile(*dq), Tile(*dkv), apart)


# (architecture, head size): queries, keys, warps, stages of the forward, dQ and dK/dV kernels.
HALF = {  # bf16 and fp16
    ("sm_80", 32): _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    ("sm_80", 64): _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("sm_80", 96): _tiles((128, 32, 8, 3), (64, 64, 8, 3), (64, 64, 8, 3)),
    ("sm_80", 128): _tiles((128, 32, 8, 3), (64, 64, 8, 3), (64, 64, 8, 3)),
    ("sm_80", 256): _tiles((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_80", 512): _tiles((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
    ("sm_86", 32): _tiles((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("sm_86", 64): _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("sm_86", 96): _tiles((128, 32, 8, 3), (64, 32, 4, 3), (64, 32, 8, 3)),
    ("sm_86", 128): _tiles((128, 32, 8, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
    ("sm_86", 256): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_86", 512): _tiles((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_89", 32): _tiles((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("sm_89", 64): _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("sm_89", 96): _tiles((128, 32, 8, 3), (64, 32, 4, 3), (64, 32, 8, 3)),
    ("sm_89", 128): _tiles((128, 32, 8, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
    ("sm_89", 256): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_89", 512): _tiles((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_120", 32): _tiles((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("sm_120", 64): _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("sm_120", 96): _tiles((128, 32, 8, 3), (64, 32, 4, 3), (64, 32, 8, 3)),
    ("sm_120", 128): _tiles((128, 32, 8, 3), (64, 32, 4, 3), (32, 64, 4, 3)),
    ("sm_120", 256): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_120", 512): _tiles((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    ("sm_90", 32): _tiles((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    ("sm_90", 64): _tiles((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_90", 96): _tiles((128, 128, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3)),
    ("sm_90", 128): _tiles((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_90", 256): _tiles((128, 32, 8, 3), (128, 32, 8, 3), (32, 128, 8, 3), apart=True),
    ("sm_90", 512): _tiles((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
    ("sm_100", 32): _tiles((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
    ("sm_100", 64): _tiles((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_100", 96): _tiles((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_100", 128): _tiles((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    ("sm_100", 256): _tiles((128, 32, 8, 3), (64, 32, 8, 3), (32, 64, 8, 3)),
    ("sm_100", 512): _tiles((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
    ("gfx942", 32): _tiles((128, 32, 4, 1), (64, 32, 4, 1), (16, 64, 4, 1)),
    ("gfx942", 64): _tiles((128, 32, 4, 1), (128, 32, 4, 1), (16, 64, 4, 1)),
    ("gfx942", 96): _tiles((128, 32, 4, 1), (128, 16, 4, 1), (16, 64, 4, 1)),
    ("gfx942", 128): _tiles((128, 32, 4, 1), (128, 16, 4, 1), (16, 64, 4, 1)),
}
SINGLE = {  # fp32 in IEEE arithmetic, without tensor cores: to check with, not to train with
    ("sm_80", 32): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_80", 64): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_80", 96): _tiles((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2)),
    ("sm_80", 128): _tiles((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2)),
    ("sm_86", 32): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_86", 64): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_89", 32): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_89", 64): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_90", 32): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_90", 64): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_90", 96): _tiles((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2)),
    ("sm_90", 128): _tiles((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2)),
    ("sm_100", 32): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_100", 64): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_100", 96): _tiles((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2)),
    ("sm_100", 128): _tiles((32, 16, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2)),
    ("sm_120", 32): _tiles((32, 16, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ("sm_120", 64): _tiles((32, 16, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
}
TF32 = {  # fp32 where torch allows TF32
    ("sm_80", 32): _tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_80", 64): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_80", 96): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_80", 128): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_86", 32): _tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_86", 64): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_89", 32): _tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_89", 64): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_90", 32): _tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_90", 64): _tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_90", 96): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_90", 128): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_100", 32): _tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_100", 64): _tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_100", 96): _tiles((64, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_100", 128): _tiles((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_120", 32): _tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    ("sm_120", 64): _tiles((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
}

# What takes more registers, in 16 bits: with a limit, a softcap, values of another size than keys, or one
# query head a key head.
BENT: dict[tuple[str, int], dict[str, Any]] = {  # a kernel's name -> its tile
    **{(arch, 128): {"dkv": Tile(64, 32, 8, 3)} for arch in ("sm_86", "sm_89", "sm_120")},
    ("sm_80", 256): {"forward": Tile(64, 32, 8, 2)},
    ("sm_90", 128): {"dkv": Tile(32, 128, 8, 3)},
    ("gfx942", 64): {"forward": Tile(64, 32, 2, 1)},
    ("sm_100", 64): {"dq": Tile(64, 64, 4, 3)},
}

# What takes more registers by Triton 3.6 than by 3.7, in 16 bits.
BEFORE_3_7: dict[tuple[str, int], dict[str, Any]] = {
    ("sm_90", 96): {"forward": Tile(128, 64, 8, 3)},
    ("sm_90", 128): {"forward": Tile(128, 64, 8, 3), "dkv": Tile(32, 128, 8, 3)},
}

# Small, odd-sided tiles let a small forest have many blocks, and show a swapped block size.
EMULATED = Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))


def tf32_allowed() -> bool:
    """Whether torch lets fp32 products be rounded to TF32."""
    return torch.get_float32_matmul_precision() != "highest"


def architecture_of(device: torch.device) -> str:
    """sm_90, gfx942; `emulated` under an emulator."""
    if emulated():
        return "emulated"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tiles_for(arch: str, head_dim: int, dtype: torch.dtype, *, bent: bool = False) -> Tiles:
    """The table's entry for a head size, or for the next larger one that it has.

    bent: with a limit, a softcap, values of another size than keys, or one query head a key head.
    ValueError, naming the backends that can, where there is none.
    """
    if missing := missing_tile(arch, head_dim, dtype):
        raise ValueError(
            f"tree_attention: backend='triton' has {missing}; use backend='flash', 'flex' or 'reference'"
        )
    if arch == "emulated":
        return EMULATED
    table = _table(dtype)
    key = (arch, min(size for one, size in table if one == arch and size >= head_dim))
    if table is not HALF:
        return table[key]
    own = BENT.get(key, {}) if bent else {}
    before = BEFORE_3_7.get(key, {}) if _triton_is_before_3_7() else {}
    return replace(table[key], **(own | before))


@functools.cache
def _triton_is_before_3_7() -> bool:
    import triton  # where the table is asked for, it is there

    major, minor = triton.__version__.split(".")[:2]
    return (int(major), int(minor)) < (3, 7)


def missing_tile(arch: str, head_dim: int, dtype: torch.dtype) -> str:
    """What the table lacks for a head size, of keys or of values, in words; "" where it has an entry."""
    largest = max((size for one, size in _table(dtype) if one == arch), default=0)
    if arch == "emulated" or head_dim <= largest:
        return ""
    has = f"head sizes up to {largest}" if largest else "no tiles"
    return f"no tile for head size {head_dim} in {dtype} on {arch} (it has {has} for this dtype there)"


def _table(dtype: torch.dtype) -> dict[tuple[str, int], Tiles]:
    single = TF32 if tf32_allowed() else SINGLE
    return {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: single}.get(dtype, {})
