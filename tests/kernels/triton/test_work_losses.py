"""Bytes and dots of the log-prob, preference and surrogate kernels, counted under Triton's interpreter."""

import numpy as np
import pytest
import torch

from mosaic_kernels import clipped_surrogate, pack_forest, pairwise_preference_loss
from mosaic_kernels.logprob.tiles import EMULATED, FEW_ROWS, Tiles, tiles_for
from mosaic_kernels.logprob.triton import tiled_linear_logprob
from tests.kernels.triton.machine import machine
from tools.verify_kernels.counters import Work, count_work, lines_from_memory, record_tiles

if machine().name != "interpreter":
    pytest.skip("work is counted under Triton's interpreter", allow_module_level=True)

VALUE = 4  # bytes of fp32
LINE = 64  # bytes
PLACES, CACHE_ROWS = 132, 1000  # of a model device: programs at a time, rows of hidden or weight in its L2


def forward_work(rows: int, vocab: int, dim: int, tiles: Tiles, *, entropy: bool = False) -> tuple[Work, int]:
    """One edge a row. Also the bytes of hidden and weight that are read from memory."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, dim, generator=generator) for n in (rows, vocab))
    targets = torch.randint(vocab, (rows,), generator=generator)
    with count_work() as work, record_tiles(LINE) as launches, torch.no_grad():
        tiled_linear_logprob(
            hidden, weight, targets, torch.arange(rows), None, 1.0, entropy, None, tiles=tiles, splits=2
        )
    cache_lines = CACHE_ROWS * dim * VALUE // LINE
    return work, LINE * lines_from_memory(launches[0], PLACES, cache_lines)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("rows", [48, FEW_ROWS, 256])
def test_the_forward_pass_reads_its_operands_once_a_tile(rows: int, entropy: bool) -> None:
    """With the tiles of sm_90: bytes within 1.2 times those of a product by blocks, and no dot too many.

    A tile of logits needs its rows of hidden and of weight, so programs load the weight once a row tile and
    hidden once a vocabulary tile. Edges, statistics and log-probs must be small beside that. What comes from
    memory is within 1.2 times hidden and weight once a row tile, whatever the tile.
    """
    vocab, dim = 4096, 128
    tiles = tiles_for("sm_90", torch.bfloat16, rows)
    tile, (work, from_memory) = tiles.forward, forward_work(rows, vocab, dim, tiles, entropy=entropy)
    row_tiles, vocab_tiles = -(-rows // tile.rows), vocab // tile.vocab
    blocks = VALUE * dim * (row_tiles * vocab + vocab_tiles * rows)
    once = VALUE * dim * (row_tiles * vocab + rows)
    print(
        f"linear_logprob forward, {rows} rows in tiles of {tile.rows} x {tile.vocab}: "
        f"{work.bytes_read:.3e} bytes read, {work.bytes_read / blocks:.3f} of operands once a tile, "
        f"{work.bytes_read / once:.3f} of hidden and weight once a row tile "
        f"({from_memory / once:.3f} from memory)"
    )
    assert VALUE * dim * (vocab + rows) <= from_memory <= 1.2 * once
    assert 1.0 <= work.bytes_read / blocks <= 1.2
    assert work.bytes_written <= 0.01 * blocks
    assert work.dots == row_tiles * vocab_tiles * dim // tile.dim
    if rows <= 48:  # where memory decides: the weight is read once, and hidden costs little beside it
        assert row_tiles == 1
        assert work.bytes_read / once <= 1.2


def test_the_backward_pass_computes_each_tile_once() -> None:
    rows, vocab, dim, tile = 64, 320, 64, EMULATED.backward
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, dim, generator=generator).requires_grad_() for n in (rows, vocab))
    logprobs, _ = tiled_linear_logprob(
        hidden, weight, torch.arange(rows), torch.arange(rows), None, 1.0, False, None,
        tiles=EMULATED, chunk_logits=rows * 100,
    )  # fmt: skip
    with count_work() as work:
        logprobs.sum().backward()
    operands = VALUE * dim * (rows // tile.rows * vocab + vocab // tile.vocab * rows)
    print(f"linear_logprob backward: {work.bytes_read / operands:.3f} of operands once a tile")
    assert 1.0 <= work.bytes_read / operands <= 1.2
    assert work.dot_flops == 2 * rows * vocab * dim
    assert 1.0 <= work.bytes_written / (VALUE * rows * vocab) <= 1.02  # dL/dlogits


def test_the_preference_loss_reads_each_token_once() -> None:
    """Forward: log-prob, reference and mask of each token. Backward: the mask, and the gradient written."""
    forest = pack_forest([[1] * 3000, [2] * 2000, [3] * 500])
    pairs = np.array([[0, 1], [1, 2]])
    policy = torch.zeros(forest.num_tokens, requires_grad=True)
    with count_work() as work:
        loss = pairwise_preference_loss(
            policy, policy.detach(), forest.trained, forest.cu_seqlens, pairs, np.ones(2), beta=0.1,
            backend="triton",
        )  # fmt: skip
    print(f"preference loss forward: {work.bytes_read / forest.num_tokens:.2f} bytes read a token")
    assert work.bytes_read <= 1.02 * forest.num_tokens * (VALUE + VALUE + 1)
    with count_work() as work:
        loss.sum().backward()
    assert work.bytes_read <= 1.1 * forest.num_tokens
    assert work.bytes_written == VALUE * forest.num_tokens


def test_the_surrogate_reads_each_value_once_and_only_where_it_counts() -> None:
    count = 5000
    weights = (torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.7).float()
    zeros = torch.zeros(count)
    with count_work() as work:
        clipped_surrogate(
            zeros, zeros, zeros, weights, reference_logprobs=zeros,
            clip_low=0.2, clip_high=0.2, kl_weight=0.1, backend="triton",
        )  # fmt: skip
    print(f"clipped surrogate: {work.bytes_read / count:.2f} bytes read a token")
    assert work.bytes_read == VALUE * (count + 4 * int(weights.sum()))
    assert work.bytes_written == 2 * VALUE * count
