"""The tile table of the linear_logprob kernels, by (architecture, number of rows) and dtype.

Every entry compiles without spills, within shared memory and to tensor-core instructions
(`python -m mosaic_kernels.verify --layer compile`; docs/lab/compiled.md). What has no such entry is absent.

With many rows the arithmetic decides, and the tile is as large as registers allow. With few rows reading the
weight decides: rows up to FEW_ROWS share one tile, so that the weight is read once.
"""

import math
from dataclasses import dataclass

import torch

FEW_ROWS = 64
PROGRAMS_PER_MULTIPROCESSOR = 4  # of the forward pass: its last wave is then at most a quarter idle


@dataclass(frozen=True)
class Tile:
    """Rows by vocabulary of one tile of logits, and how many hidden dimensions are loaded at a time."""

    rows: int
    vocab: int
    dim: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """One tile for each pass; the backward pass keeps more in registers."""

    forward: Tile
    backward: Tile

    def __post_init__(self) -> None:
        # The backward pass subtracts the forward pass's logsumexp from its own logits: sums over the hidden
        # size taken in another order would leave their rounding in every probability.
        if self.forward.dim != self.backward.dim:
            raise ValueError(f"both passes must load the same number of dimensions at a time, got {self}")


def _same(tile: Tile) -> Tiles:
    return Tiles(tile, tile)


# 16-bit dtypes (bf16, fp16): (architecture, few rows) -> tiles.
HALF: dict[tuple[str, bool], Tiles] = {
    **{(arch, False): _same(Tile(128, 128, 32, 8, 4)) for arch in ("sm_80", "sm_86", "sm_89", "sm_120")},
    **{(arch, True): _same(Tile(64, 256, 32, 8, 4)) for arch in ("sm_80", "sm_86", "sm_89", "sm_120")},
    ("sm_90", False): Tiles(Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    ("sm_90", True): _same(Tile(64, 256, 64, 8, 3)),
    ("sm_100", False): _same(Tile(128, 128, 64, 8, 3)),
    ("sm_100", True): _same(Tile(64, 128, 64, 4, 3)),
    ("gfx942", False): _same(Tile(128, 128, 64, 8, 2)),
    ("gfx942", True): _same(Tile(32, 128, 64, 4, 2)),
}

# fp32, IEEE or TF32: one tile however many rows.
SINGLE: dict[tuple[str, bool], Tiles] = {
    (arch, few): _same(tile)
    for few in (False, True)
    for arch, tile in {
        **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), Tile(64, 64, 32, 8, 2)),
        **dict.fromkeys(("sm_90", "sm_100"), Tile(64, 64, 32, 4, 2)),
        "gfx942": Tile(64, 128, 16, 8, 2),
    }.items()
}

# Small and odd-sided, so that small problems have many tiles and a swapped side shows.
EMULATED = Tiles(Tile(16, 32, 16, 4, 2), Tile(32, 16, 16, 4, 2))


def tiles_for(arch: str, dtype: torch.dtype, num_rows: int) -> Tiles:
    """The table's entry; ValueError, naming the backends that can, where there is none."""
    if dtype == torch.float64:
        raise ValueError(
            "linear_logprob: backend='triton' computes in fp32 and takes bf16, fp16 or fp32; "
            "for fp64 use backend='chunked' or 'reference'"
        )
    if missing := missing_tile(arch, dtype):
        raise ValueError(
            f"linear_logprob: backend='triton' has {missing}; use backend='chunked' or 'reference'"
        )
    return EMULATED if arch == "emulated" else _table(dtype)[arch, num_rows <= FEW_ROWS]


def missing_tile(arch: str, dtype: torch.dtype) -> str:
    """What the table lacks for this, in words; "" where it has entries, for few rows and for many."""
    known = {one for one, _ in _table(dtype)}
    if arch == "emulated" or arch in known:
        return ""
    return f"no tile for {dtype} on {arch} (it has {', '.join(sorted(known))})"


def _table(dtype: torch.dtype) -> dict[tuple[str, bool], Tiles]:
    return SINGLE if dtype == torch.float32 else HALF


def vocabulary_shares(num_rows: int, tile: Tile, multiprocessors: int) -> int:
    """How many shares the forward pass cuts the vocabulary into; the programs of one row tile run together.

    Enough to fill the device, however few rows there are. And, when rows are many, enough for what runs at a
    time to stay in L2: M programs, S shares of M / S row tiles, hold M / S * R rows of hidden and S * C of
    weight, which is least at S = sqrt(M R / C).
    """
    fill = -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(1, -(-num_rows // tile.rows)))
    return max(fill, round(math.sqrt(multiprocessors * tile.rows / tile.vocab)))
