"""The forest: every rollout of a step in one trie over token ids, laid out depth first."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

MAX_TOKEN_ID = 2**32 - 1


@dataclass(frozen=True, eq=False)
class PackedForest:
    """Prefix trees in depth-first order, one packed position for each distinct (prefix, token).

    U packed positions (nodes), T rollout tokens, R rollouts, in the order in which they were given.
    All index arrays are int64, so that torch indexes with them as they are.

    Example: the rollouts [5, 6, 7] and [5, 6, 8] share two of their three tokens:
        tokens       [5, 6, 7, 8]
        positions    [0, 1, 2, 2]
        parent       [-1, 0, 1, 1]
        subtree_end  [4, 4, 3, 4]
        node_index   [0, 1, 2,  0, 1, 3]
        cu_seqlens   [0, 3, 6]
    """

    tokens: IntArray  # [U] token id of a node
    positions: IntArray  # [U] depth of a node = its position in every rollout through it
    subtree_end: IntArray  # [U] exclusive end of its subtree: q sees k iff k <= q < subtree_end[k]
    parent: IntArray  # [U] the node it is predicted at, -1 at a root
    node_index: IntArray  # [T] rollout r's t-th token is node node_index[cu_seqlens[r] + t]
    cu_seqlens: IntArray  # [R+1] where each rollout starts among the T rollout tokens
    trained: BoolArray  # [T] belongs to the rollout token: a shared node may be trained in one rollout only
    source: IntArray | None = (
        None  # [T] parts of `split_forest` only: index of each rollout token in the uncut forest
    )

    @property
    def num_nodes(self) -> int:
        """U, the distinct (prefix, token) pairs: what a forward pass costs."""
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """T, the tokens of all rollouts: what the flat batch costs."""
        return len(self.node_index)

    @property
    def num_rollouts(self) -> int:
        """R, empty rollouts included."""
        return len(self.cu_seqlens) - 1


def pack_forest(sequences: Sequence[ArrayLike], trained: Sequence[ArrayLike] | None = None) -> PackedForest:
    """Merge rollouts into prefix trees.

    Rollouts are sorted, so that each one's longest common prefix with all earlier ones is the one with
    its neighbour; the rest of it is a run of new nodes. One pass over rollouts (never over tokens) copies
    the shared part of the path, numbers the new run and closes the subtrees that end there. Siblings are
    ordered by token id.

    sequences: R integer arrays [L_r], token ids in [0, 2**32); L_r may be 0.
    trained: R bool arrays [L_r], True where the policy sampled the token. None: all but each rollout's
        first token. The first token of a rollout has no predecessor and cannot be trained.
    ValueError names the rollout that is malformed.

    >>> pack_forest([[5, 6, 7], [5, 6, 8]]).subtree_end
    array([4, 4, 3, 4])
    """
    flat, cu_seqlens = _concatenate(sequences)
    lengths = np.diff(cu_seqlens)
    mask = _trained_mask(trained, cu_seqlens, lengths)

    # Big-endian, because the order of bytes is then the order of token ids.
    ordered = flat.astype(">u4")
    keys = [ordered[a:b].tobytes() for a, b in pairwise(cu_seqlens.tolist())]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    start, size = cu_seqlens[order], lengths[order]
    shared = _shared_with_previous(flat, start, size)
    new = size - shared
    run = np.cumsum(new) - new  # first new node of each rollout, in sorted order
    num_nodes = int(new.sum())

    count = np.arange(num_nodes)
    node_index = np.empty(len(flat), np.int64)
    tokens, subtree_end = np.empty(num_nodes, np.int64), np.empty(num_nodes, np.int64)
    previous = 0  # where the sorted neighbour starts in flat
    open_runs: list[tuple[int, int, int]] = []  # (depth, node, stop): the open path as runs, nested by depth
    for a, n, common, node in zip(start.tolist(), size.tolist(), shared.tolist(), run.tolist(), strict=True):
        while open_runs and open_runs[-1][0] >= common:
            _, first, stop = open_runs.pop()
            subtree_end[first:stop] = node
        if open_runs and open_runs[-1][0] + open_runs[-1][2] - open_runs[-1][1] > common:
            depth, first, stop = open_runs[-1]
            cut = first + common - depth
            subtree_end[cut:stop] = node
            open_runs[-1] = (depth, first, cut)
        if common:
            node_index[a : a + common] = node_index[previous : previous + common]
        if common < n:
            stop = node + n - common
            node_index[a + common : a + n] = count[node:stop]
            tokens[node:stop] = flat[a + common : a + n]
            open_runs.append((common, node, stop))
        previous = a
    for _, first, stop in open_runs:
        subtree_end[first:stop] = num_nodes

    parent = count - 1
    attached = (new > 0) & (shared > 0)
    parent[run[new > 0]] = -1
    parent[run[attached]] = node_index[start[attached] + shared[attached] - 1]
    return PackedForest(
        tokens=tokens,
        positions=count + np.repeat(shared - run, new),
        subtree_end=subtree_end,
        parent=parent,
        node_index=node_index,
        cu_seqlens=cu_seqlens,
        trained=mask,
    )


def _shared_with_previous(flat: IntArray, start: IntArray, size: IntArray) -> IntArray:
    """Length of each sorted rollout's common prefix with the one before it [R]; 0 for the first.

    Every pair's first tokens are compared at once, which settles most pairs of many short rollouts; pairs
    that are still equal there are compared one by one.
    """
    shared = np.zeros(len(start), np.int64)
    if len(start) < 2 or not len(flat):
        return shared
    limit = np.minimum(size[:-1], size[1:])
    column = np.arange(16)
    last = len(flat) - 1
    left = flat[np.minimum(start[:-1, None] + column, last)]
    right = flat[np.minimum(start[1:, None] + column, last)]
    equal = (left == right) & (column < limit[:, None])
    shared[1:] = np.where(equal.all(axis=1), len(column), equal.argmin(axis=1))
    for pair in np.flatnonzero(shared[1:] == len(column)).tolist():
        a, b, n = int(start[pair]), int(start[pair + 1]), int(limit[pair])
        differs = flat[a : a + n] != flat[b : b + n]
        first = int(differs.argmax())
        shared[pair + 1] = first if differs[first] else n
    return shared


def _concatenate(sequences: Sequence[ArrayLike]) -> tuple[IntArray, IntArray]:
    """All token ids in a row [T] and where each rollout starts [R+1]; refuses what is not a token list."""
    arrays = []
    for index, sequence in enumerate(sequences):
        array = np.asarray(sequence)
        if array.ndim != 1:
            raise ValueError(f"sequences[{index}] must be one-dimensional, got shape {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"sequences[{index}] must hold integers, got {array.dtype}")
        arrays.append(array)
    cu_seqlens = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([array.size for array in arrays], out=cu_seqlens[1:])
    filled = [array for array in arrays if array.size]
    flat = np.concatenate(filled, dtype=np.int64, casting="same_kind") if filled else np.zeros(0, np.int64)
    if flat.size and flat.view(np.uint64).max() > MAX_TOKEN_ID:  # a negative id is a huge unsigned one
        where = int(np.flatnonzero((flat < 0) | (flat > MAX_TOKEN_ID))[0])
        rollout = int(np.searchsorted(cu_seqlens, where, side="right")) - 1
        raise ValueError(
            f"sequences[{rollout}][{where - cu_seqlens[rollout]}] is {flat[where]}: "
            f"token ids must lie in [0, {MAX_TOKEN_ID}]"
        )
    return flat, cu_seqlens


def _trained_mask(trained: Sequence[ArrayLike] | None, cu_seqlens: IntArray, lengths: IntArray) -> BoolArray:
    """The mask of all rollout tokens [T], checked against the sequences."""
    firsts = cu_seqlens[:-1][lengths > 0]
    if trained is None:
        mask = np.ones(int(cu_seqlens[-1]), np.bool_)
        mask[firsts] = False
        return mask
    if len(trained) != len(lengths):
        raise ValueError(f"trained has {len(trained)} masks for {len(lengths)} sequences")
    masks = []
    for index, (one, length) in enumerate(zip(trained, lengths.tolist(), strict=True)):
        array = np.asarray(one)
        if array.shape != (length,):
            raise ValueError(
                f"trained[{index}] has shape {array.shape}, sequences[{index}] has {length} tokens"
            )
        if length and array.dtype != np.bool_:
            raise ValueError(f"trained[{index}] must hold booleans, got {array.dtype}")
        masks.append(array.astype(np.bool_, copy=False))
    mask = np.concatenate(masks) if masks else np.zeros(0, np.bool_)
    if mask[firsts].any():
        rollout = int(np.flatnonzero(lengths > 0)[np.flatnonzero(mask[firsts])[0]])
        raise ValueError(
            f"trained[{rollout}][0] is True: the first token of a rollout has no predecessor to predict it"
        )
    return mask
