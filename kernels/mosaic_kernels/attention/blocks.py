"""Which blocks of keys a block of queries visits: skip lists for the Triton kernels, built on the device.

In depth-first order a block of keys can only be seen by a block of queries if its first key is not after the
last query, and its largest subtree_end is after the first query; if also its last key is not after the first
query, and its smallest subtree_end is after the last query, every pair is visible and no mask is needed. So
min and max of subtree_end over each block decide; nothing of size U * U exists.

Example: blocks of 2 over subtree_end = [4, 4, 3, 4]: queries {2, 3} see keys {0, 1} in full, and their own
block in part.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mosaic_kernels.forest.layout import IntArray

Depths = TypeVar("Depths", torch.Tensor, IntArray)


def first_blind_depth(positions: Depths, window: int | None, chunk: int | None) -> Depths:  # [U] -> [U]
    """The depth from which on a query no longer sees each key: by a sliding window, or at its chunk's end.

    Along a path a query sees keys of smaller depth, so one number a key says both.
    """
    if chunk is not None:
        return (positions // chunk + 1) * chunk
    assert window is not None
    return positions + window


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each block of one side, the blocks of the other side to visit. Longest lists come first."""

    work: torch.Tensor  # [B, 4] int32: block, first entry, first entry that needs a mask, end of entries
    blocks: torch.Tensor  # [entries + 1] int32: of a block the full ones, then the masked ones, each rising


@dataclass(frozen=True, eq=False)
class Tree:
    """A packed forest as the kernels read it, shared by all layers, with its block lists."""

    end: torch.Tensor  # [U] int32 subtree_end
    rows: torch.Tensor  # [Uq] int32, rising: packed position of each query
    limit: torch.Tensor | None  # [U] int32: the first depth that no longer sees the key; None: all do
    row_depth: torch.Tensor | None  # [Uq] int32, with a limit
    sources: tuple[torch.Tensor | None, ...] = ()  # keeps what it was made from alive while it is cached
    derived: dict[str, Any] = field(default_factory=dict, repr=False)  # what other backends make of it
    _lists: dict[tuple[int, int, bool], BlockLists] = field(default_factory=dict, repr=False)

    def lists(self, block_q: int, block_k: int, *, by_key: bool) -> BlockLists:
        """The lists of each block of queries (or, by key, of each block of keys) for these block sizes."""
        wanted = (block_q, block_k, by_key)
        if wanted not in self._lists:
            visited, full = self.pairs(block_q, block_k)
            self._lists[wanted] = _lists(visited.T, full.T) if by_key else _lists(visited, full)
        return self._lists[wanted]

    def pairs(self, block_q: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[query blocks, key blocks] bool: whether any pair may be visible, and whether all are."""
        first_q, last_q = (one[:, None] for one in _min_max(self.rows, block_q))
        key = torch.arange(len(self.end), device=self.end.device)
        first_k, last_k = _min_max(key, block_k)
        lowest_end, highest_end = _min_max(self.end, block_k)
        visited = (first_k <= last_q) & (first_q < highest_end)
        complete = last_k - first_k == block_k - 1  # a tail block's missing keys must be masked
        full = (last_k <= first_q) & (last_q < lowest_end) & complete
        if self.limit is not None and self.row_depth is not None:
            shallowest_q, deepest_q = (one[:, None] for one in _min_max(self.row_depth, block_q))
            lowest_limit, highest_limit = _min_max(self.limit, block_k)
            visited &= shallowest_q < highest_limit
            full &= deepest_q < lowest_limit
        return visited, full


def tree_for(
    subtree_end: torch.Tensor,  # [U] int64
    queries: torch.Tensor | None,  # [Uq] int64, None: all
    positions: torch.Tensor | None,  # [U] int64
    window: int | None,
    chunk: int | None = None,
) -> Tree:
    """The Tree of these index arrays. On an accelerator it is kept as long as the subtree_end tensor lives.

    There the key is each tensor's identity and version: comparing contents would wait for the device at every
    call. A CPU tensor may change through numpy without a new version, so under an emulator nothing is kept.
    """
    sources = (queries, positions)
    given = [x for x in (subtree_end, *sources) if x is not None]
    if subtree_end.device.type == "cpu" or any(x.is_inference() for x in given):
        return _make_tree(subtree_end, queries, positions, window, chunk)
    kept: dict[tuple[object, ...], Tree] = _TREES.setdefault(subtree_end, {})
    versions = (None if x is None else (id(x), x._version) for x in sources)
    key = (window, chunk, subtree_end._version, *versions)
    if key not in kept:
        kept[key] = _make_tree(subtree_end, queries, positions, window, chunk)
    return kept[key]


_TREES = WeakTensorKeyDictionary()


def _make_tree(
    subtree_end: torch.Tensor,
    queries: torch.Tensor | None,
    positions: torch.Tensor | None,
    window: int | None,
    chunk: int | None,
) -> Tree:
    rows = torch.arange(len(subtree_end), device=subtree_end.device) if queries is None else queries
    limited = positions is not None and (window, chunk) != (None, None)
    return Tree(
        end=subtree_end.int(),
        rows=rows.int(),
        limit=first_blind_depth(positions, window, chunk).int() if limited else None,
        row_depth=positions.int()[rows] if limited else None,
        sources=(queries, positions),
    )


def _min_max(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest value of each block; a short last block is filled with its last value."""
    missing = -len(values) % block
    blocks = torch.cat([values, values[-1:].expand(missing)]).view(-1, block)
    return blocks.amin(1), blocks.amax(1)


def _lists(visited: torch.Tensor, full: torch.Tensor) -> BlockLists:
    """CSR lists of two [B, C] bool matrices, in the order of falling length (ties: rising block)."""
    count = visited.sum(1)
    block = torch.argsort(count, descending=True, stable=True)
    visited, full, count = visited[block], full[block] & visited[block], count[block]
    # Side by side, so that a row's full blocks come before its masked ones.
    entries = torch.cat([full, visited & ~full], 1).nonzero()[:, 1] % visited.shape[1]
    stop = count.cumsum(0)
    first = stop - count
    work = torch.stack([block, first, first + full.sum(1), stop], 1)
    # The kernels read an entry ahead: behind the last one there is one more, which nobody visits.
    return BlockLists(work=work.int(), blocks=torch.nn.functional.pad(entries, (0, 1)).int())
