"""What the log-prob kernels read from memory behind an L2 cache: their loads replayed (`lines_from_memory`).

The model device is a small H100: 32 programs at a time and a cache of 400 rows. There (132 programs, tiles of
128 x 256, rows of 8 KiB) the rows of one tile for each program are 2.6 times its L2, here they are 1.3 times.
"""

import pytest
import torch

from mosaic_kernels.logprob.kernels import GROUP_ROWS
from mosaic_kernels.logprob.tiles import Tile, Tiles, tiles_for, vocabulary_shares
from mosaic_kernels.logprob.triton import tiled_linear_logprob
from tests.kernels.triton.machine import machine
from tools.verify_kernels.counters import lines_from_memory, record_tiles

if machine().name != "interpreter":
    pytest.skip("loads are recorded under Triton's interpreter", allow_module_level=True)

PLACES, CACHE_LINES = 32, 400
LINE = 64  # bytes: a row of 16 in fp32
ROWS, VOCAB, DIM = 512, 384, LINE // 4
TILES = Tiles(Tile(16, 32, 16, 4, 2), Tile(16, 16, 16, 4, 2))  # an eighth of sm_90's, either way


def test_many_rows_do_not_read_their_hidden_states_again_for_every_tile() -> None:
    """From memory: hidden once, and the weight once a wave of row tiles; within 1.2 times, both passes.

    That is far below hidden and weight once a row tile. One row tile beside another through the whole
    vocabulary would read hidden for every tile of it: ROWS do not fit in the cache.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, DIM, generator=generator).requires_grad_() for n in (ROWS, VOCAB))
    targets, rows = torch.tensor([3, 200, 380]), torch.tensor([0, 100, 511])
    shares = vocabulary_shares(ROWS, TILES.forward, PLACES)
    with record_tiles(LINE) as forward:
        logprobs, _ = tiled_linear_logprob(
            hidden, weight, targets, rows, None, 1.0, False, None, tiles=TILES, splits=shares
        )
    with record_tiles(LINE) as backward:
        logprobs.sum().backward()
    row_tiles = ROWS // TILES.forward.rows
    once_a_row_tile = ROWS + row_tiles * VOCAB
    for name, launches, waves in (
        ("forward", forward, row_tiles * shares // PLACES),
        ("backward", backward, row_tiles // int(GROUP_ROWS)),
    ):
        programs = max(launches, key=len)
        loaded = sum(len(lines) for program in programs for lines in program)
        read = lines_from_memory(programs, PLACES, CACHE_LINES)
        ideal = ROWS + waves * VOCAB
        print(
            f"linear_logprob {name}, {ROWS} rows, a model L2 of {CACHE_LINES}: {read} rows read from memory, "
            f"{read / ideal:.3f} of hidden once and weight once a wave; of hidden and weight once a row tile "
            f"{read / once_a_row_tile:.3f}, loaded by programs {loaded / once_a_row_tile:.3f}"
        )
        assert 1.0 <= read / ideal <= 1.2
        assert read <= 1.2 * once_a_row_tile
        assert lines_from_memory(programs, PLACES, 0) == loaded  # without a cache, every load counts


def test_the_vocabulary_is_shared_so_that_waves_fit_in_l2() -> None:
    """On an H100 (132 multiprocessors, 50 MB of L2) with rows of 4,096 in 16 bits, however many there are.

    What is in flight takes 80% of L2 at most; or, with few rows, hidden is little beside the weight, which
    streams through.
    """
    tile = tiles_for("sm_90", torch.bfloat16, 100_000).forward
    for rows in (65, 1000, 5000, 20_000, 1_000_000):
        row_tiles, shares = -(-rows // tile.rows), vocabulary_shares(rows, tile, 132)
        assert row_tiles * shares >= 4 * 132
        hidden = min(row_tiles, -(-132 // shares)) * tile.rows
        weight = min(shares, 132) * tile.vocab
        assert (hidden + weight) * 4096 * 2 <= 0.8 * 50e6 or hidden <= 0.05 * weight
