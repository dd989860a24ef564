"""The tile table of the Triton kernels: block sizes, warps and stages by (architecture, head size, dtype).

Every entry compiles without spills, within shared memory and to tensor-core instructions
(`python -m mosaic_kernels.verify --layer compile`; docs/compiled.md). What has no such entry is absent.
"""

from dataclasses import dataclass

import torch

from mosaic_kernels.dispatch import emulated


@dataclass(frozen=True)
class Tile:
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """One tile for each kernel."""

    forward: Tile
    dq: Tile
    dkv: Tile


# 16-bit dtypes (bf16, fp16): (architecture, head size) -> tiles.
HALF: dict[tuple[str, int], Tiles] = {
    (arch, head): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2))
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
    for head in (32, 64, 96, 128, 256)
}

# fp32, IEEE or TF32.
SINGLE: dict[tuple[str, int], Tiles] = {
    (arch, head): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
    for head in (32, 64, 96, 128)
}

# Small, odd-sided tiles let a small forest have many blocks, and show a swapped block size.
EMULATED = Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))


def architecture_of(device: torch.device) -> str:
    """sm_90, gfx942; `emulated` under an emulator."""
    if emulated():
        return "emulated"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tiles_for(arch: str, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The table's entry; ValueError, naming the backends that can, where there is none."""
    if arch == "emulated":
        return EMULATED
    table = {torch.bfloat16: HALF, torch.float16: HALF, torch.float32: SINGLE}.get(dtype, {})
    if (arch, head_dim) not in table:
        known = sorted(head for one, head in table if one == arch)
        has = f"head sizes {', '.join(map(str, known))}" if known else "no tiles"
        raise ValueError(
            f"tree_attention: backend='triton' has no tile for head size {head_dim} in {dtype} on {arch} "
            f"(it has {has} for this dtype there); use backend='flash', 'flex' or 'reference'"
        )
    return table[arch, head_dim]
