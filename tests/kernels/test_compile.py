"""Ahead-of-time compilation: what it must find in the machine code (all of it: verify --layer compile)."""

import multiprocessing
from pathlib import Path

import torch

from mosaic_kernels.attention.kernels import backward
from mosaic_kernels.attention.tiles import Tile, Tiles
from tools.verify_kernels.cases import ARCHITECTURES, all_cases, attention_tile_cases
from tools.verify_kernels.compile import Compiled, compile_all, compile_case

COMPILED = Path(__file__).parents[2] / "docs" / "lab" / "compiled.md"


def test_bf16_heads_of_128_use_tensor_cores_without_spills() -> None:
    found = [*compile_all(holding="forward bf16 D128"), *compile_all("sm_90", "dkv bf16 D128")]
    bends = ("", " window", " softcap")
    assert {(one.arch, one.name) for one in found} == {
        *((arch, f"forward bf16 D128{bend}") for arch in ARCHITECTURES for bend in bends),
        *(("sm_90", f"dkv bf16 D128{bend}") for bend in bends),
    }
    for one in found:
        assert one.problems == ()
        assert one.matrix_instructions > 0
        assert 32 < one.registers <= 512
        assert 0 < one.shared_bytes <= ARCHITECTURES[one.arch].block_shared_bytes
        assert one.blocks_per_sm >= 1


def _backward_of_sm_90(head_dim: int, tile: Tile) -> Compiled:
    """The bf16 dK/dV kernel. Runs in its own process."""
    made = attention_tile_cases("sm_90", head_dim, Tiles(tile, tile, tile), torch.bfloat16)
    return compile_case(next(case for case in made if case.name.startswith("dkv")))


def test_a_tile_that_does_not_fit_is_found_out() -> None:
    """Compiling alone rejects neither spills nor too much shared memory, nor warps that do the same work."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        large = pool.apply(_backward_of_sm_90, (256, Tile(64, 128, 8, 2)))
        few_keys = pool.apply(_backward_of_sm_90, (128, Tile(64, 64, 8, 2)))
    spills, oversize, *_ = large.problems
    assert spills.endswith(" spills")
    assert oversize.endswith("bytes of shared memory, the limit is 232448")
    source = Path(backward.__file__).read_text().splitlines()
    loops = [
        f"backward.py:{n}" for n, line in enumerate(source, 1) if line.startswith("    for step in range")
    ]
    assert list(few_keys.problems) == [
        f"{loop}: {problem}"
        for loop in loops
        for problem in (
            "1.50 of the tile's products",
            "2.00 of the tile's exponentials",
            "no copies in flight while it waits for a tile's",
        )
    ]


def test_the_table_in_the_docs_has_every_case_and_no_problem() -> None:
    rows = [line.split("|")[1:-1] for line in COMPILED.read_text().splitlines() if line.startswith("| ")][1:]
    written = [(arch.strip(), op.strip(), kernel.strip()) for arch, op, kernel, *_ in rows]
    assert written == [(case.arch, case.op, case.name) for case in all_cases()], f"rewrite {COMPILED}"
    assert all(int(row[4]) == 0 for row in rows)
