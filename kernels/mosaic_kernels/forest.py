"""The forest: every rollout of a step in one trie over token ids, laid out depth first."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    its neighbour; the rest of it is a run of new nodes. One pass over rollouts (never over tokens)
    copies the shared part of the path, numbers the new run and closes the subtrees that end there.
    Siblings are ordered by token id.

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

    ordered_bytes = flat.astype(">u4").tobytes()  # big-endian: the order of bytes is the order of token ids
    keys = [
        ordered_bytes[4 * a : 4 * b]
        for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)

    starts, sizes = cu_seqlens.tolist(), lengths.tolist()
    node_index = np.empty(len(flat), np.int64)
    subtree_end = np.empty(len(flat), np.int64)  # trimmed to U below
    run_start, run_depth, run_parent = [], [], []
    num_nodes = 0
    previous, previous_size = 0, 0  # flat offset and length of the sorted neighbour
    for rollout in order:
        start, size = starts[rollout], sizes[rollout]
        shared = _common_prefix(flat, previous, start, min(previous_size, size))
        path = node_index[previous : previous + previous_size]
        subtree_end[path[shared:]] = num_nodes
        node_index[start : start + shared] = path[:shared]
        if shared < size:
            run_start.append(num_nodes)
            run_depth.append(shared)
            run_parent.append(path[shared - 1] if shared else -1)
            new = size - shared
            node_index[start + shared : start + size] = np.arange(num_nodes, num_nodes + new)
            num_nodes += new
        previous, previous_size = start, size
    subtree_end[node_index[previous : previous + previous_size]] = num_nodes

    tokens = np.empty(num_nodes, np.int64)
    tokens[node_index] = flat  # equal prefixes write equal tokens
    parent = np.arange(-1, num_nodes - 1, dtype=np.int64)
    parent[run_start] = run_parent
    runs = np.asarray(run_start, np.int64)
    shift = np.asarray(run_depth, np.int64) - runs
    positions = np.arange(num_nodes) + np.repeat(shift, np.diff(runs, append=num_nodes))
    return PackedForest(
        tokens=tokens,
        positions=positions,
        subtree_end=subtree_end[:num_nodes].copy(),
        parent=parent,
        node_index=node_index,
        cu_seqlens=cu_seqlens,
        trained=mask,
    )


def _common_prefix(flat: IntArray, a: int, b: int, limit: int) -> int:
    """Length of the longest common prefix of flat[a : a+limit] and flat[b : b+limit]."""
    if limit == 0 or flat[a] != flat[b]:
        return 0
    differs = flat[a : a + limit] != flat[b : b + limit]
    first = int(differs.argmax())
    return first if differs[first] else limit


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
    flat = np.concatenate(filled).astype(np.int64, copy=False) if filled else np.zeros(0, np.int64)
    if flat.size and (flat.min() < 0 or flat.max() > MAX_TOKEN_ID):
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
