"""Tiles of the linear_logprob kernels: a small table by architecture, dtype and number of rows."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Rows by vocabulary of one tile of logits, and how many hidden dimensions are loaded at a time."""

    rows: int
    vocab: int
    dim: int
    num_warps: int
    num_stages: int
