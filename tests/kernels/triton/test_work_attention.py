"""Multiply-adds and bytes of the attention kernels, counted under Triton's interpreter, against the ideal."""

import numpy as np
import pytest
import torch

from mosaic_kernels import PackedForest, pack_forest
from mosaic_kernels.attention.blocks import tree_for
from mosaic_kernels.attention.tiles import Tile, Tiles
from mosaic_kernels.attention.triton import attend
from tests.kernels.triton.machine import machine
from tools.verify_kernels.counters import Work, count_work

TOKENS, HEAD_DIM = 2048, 64
TILE = Tile(128, 64, 8, 3)  # the forward's of most architectures; wide tiles keep the interpreter quick
BYTES = 4  # an fp32

if machine().name != "interpreter":
    pytest.skip("work is counted under Triton's interpreter", allow_module_level=True)


def forest_of_2048() -> PackedForest:
    """A trunk of 512 tokens, 6 branches of 192 that fork twice more, and a small tree beside it."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return rng.integers(10**6, size=count).tolist()

    trunk, rollouts = draw(512), [draw(80)]
    for _ in range(6):
        branch = trunk + draw(96)
        rollouts += [branch + draw(48), branch + draw(48 + 32), branch[:-32] + draw(16)]
    forest = pack_forest([*rollouts, draw(TOKENS - 80 - 512 - 6 * (96 + 48 + 80 + 16))])
    assert forest.num_nodes == TOKENS
    return forest


def ideal_blocks(forest: PackedForest, tile: Tile) -> int:
    """Blocks of queries and keys with at least one visible pair, from the dense mask."""
    node = np.arange(forest.num_nodes)
    visible = (node[None, :] <= node[:, None]) & (node[:, None] < forest.subtree_end[None, :])
    blocks = visible.reshape(TOKENS // tile.block_q, tile.block_q, TOKENS // tile.block_k, tile.block_k)
    return int(blocks.any(axis=(1, 3)).sum())


def counted(forest: PackedForest) -> tuple[Work, Work]:
    """The work of a forward, and of a backward, of one head in fp32."""
    tree = tree_for(torch.from_numpy(forest.subtree_end), None, None, None)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(TOKENS, 1, HEAD_DIM, generator=generator).requires_grad_() for _ in range(3)]
    with count_work() as forward:
        out = attend(*leaves, tree=tree, scale=0.125, tiles=Tiles(TILE, TILE, TILE))
    with count_work() as backward:
        out.sum().backward()
    return forward, backward


def test_blocks_that_nobody_sees_cost_nothing() -> None:
    """Multiply-adds within 1.15 of the mask's ideal at block granularity; bytes bounded by the blocks."""
    forest = forest_of_2048()
    blocks = ideal_blocks(forest, TILE)
    dot = 2 * TILE.block_q * TILE.block_k * HEAD_DIM
    forward, backward = counted(forest)
    dense = TOKENS**2 // (TILE.block_q * TILE.block_k)
    matrix = TOKENS * HEAD_DIM * BYTES
    print(f"\n{blocks} blocks of {TILE.block_q} x {TILE.block_k} hold a visible pair, of {dense}")
    for name, work, dots, reads in (
        # Q once; K and V once a block.
        ("forward", forward, 2, matrix + 2 * blocks * TILE.block_k * HEAD_DIM * BYTES),
        # delta: out and grad. dQ: Q, grad once, K and V a block. dK/dV: K, V once, Q and grad a block.
        (
            "backward",
            backward,
            7,
            6 * matrix + 2 * blocks * (TILE.block_k + TILE.block_q) * HEAD_DIM * BYTES,
        ),
    ):
        flops = dots * blocks * dot
        print(
            f"{name}: {work.dot_flops:.3e} FLOP, {work.dot_flops / flops:.3f} of the ideal by blocks; "
            f"{work.bytes_read:.3e} bytes read, {work.bytes_read / reads:.3f} of tiles once a block; "
            f"{work.bytes_written:.3e} bytes written"
        )
        assert 1.0 <= work.dot_flops / flops <= 1.15
        assert work.bytes_read <= 1.1 * reads  # a tenth for positions, statistics and lists
    statistics = TOKENS * BYTES
    assert forward.bytes_written == matrix + statistics
    assert backward.bytes_written == 3 * matrix + statistics
