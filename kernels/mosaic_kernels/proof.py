"""Every op on this machine against the fp64 oracle on random forests: what `mosaic_kernels.verify` runs.

Prints one line for each op, backend, device and dtype: the element of a result or of a gradient, over all
random forests, whose error takes the largest share of what rounding explains (mosaic_kernels.rounding).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from mosaic_kernels import attention, logprob, preference, surrogate
from mosaic_kernels.attention import tree_attention
from mosaic_kernels.dispatch import Backends, result_dtype
from mosaic_kernels.forest.layout import PackedForest, pack_forest
from mosaic_kernels.logprob import linear_logprob
from mosaic_kernels.magnitudes import (
    attention_magnitudes,
    forest_preference_magnitudes,
    logprob_magnitudes,
    preference_magnitudes,
    surrogate_magnitudes,
)
from mosaic_kernels.oracle import (
    attention_of_rollouts,
    logprobs_of_edges,
    preference_loss_of_pairs,
    preference_loss_of_rollouts,
    surrogate_of_tokens,
)
from mosaic_kernels.preference import forest_preference_loss, pairwise_preference_loss
from mosaic_kernels.rounding import Magnitude, Worst, weighting, worst_of
from mosaic_kernels.surrogate import clipped_surrogate

KERNEL_BACKENDS = ("triton", "flash", "flex")
HALVES = (torch.bfloat16, torch.float16)
GUARD = 256  # elements on either side of an input; a multiple of what loads are aligned to

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """One op on one forest: its differentiable inputs, how to call it, and what it must equal."""

    op: str
    backends: Backends
    leaves: Tensors  # fp64 on CPU
    call: Callable[[Tensors, str], Sequence[torch.Tensor]]
    oracle: Callable[[Tensors], Sequence[torch.Tensor]]
    # of the results' weights, exact inputs and their dtype: sums of |terms| of results and gradients
    magnitudes: Callable[[Tensors, Tensors, torch.dtype], Sequence[Magnitude]]
    terms: int  # of the longest sum


@dataclass(frozen=True)
class Sizes:
    """What random problems are drawn from."""

    longest: int  # tokens that a rollout adds to what it shares
    vocab: int
    heads: tuple[tuple[int, int, int], ...] = ((4, 2, 32), (3, 3, 16), (4, 1, 20))  # Hq, Hkv, D


SMALL, LARGE = Sizes(12, 61), Sizes(140, 61)
ON_DEVICE = Sizes(300, 1009, ((4, 2, 64), (8, 2, 128), (3, 3, 96), (2, 1, 256), (4, 1, 32), (2, 1, 512)))


class AttentionOptions(TypedDict):
    window: int | None
    chunk: int | None
    softcap: float | None


def random_forest(seed: int, sizes: Sizes) -> PackedForest:
    """Several trees: forks, duplicates, strict prefixes, one-token and empty rollouts, masks that differ."""
    rng = np.random.default_rng(seed)
    sequences: list[list[int]] = [[]]
    for _ in range(int(rng.integers(4, 12))):
        donor = sequences[int(rng.integers(len(sequences)))]
        cut = int(rng.integers(len(donor) + 1))
        tail = rng.integers(sizes.vocab, size=int(rng.integers(0, sizes.longest))).tolist()
        sequences.append(donor[:cut] + tail if rng.random() < 0.7 else list(donor[: cut + 1]) or tail[:1])
    trained = [rng.random(len(s)) * (np.arange(len(s)) > 0) > 0.3 for s in sequences]
    return pack_forest(sequences, trained)


def problems(seed: int, sizes: Sizes) -> Iterator[Problem]:
    """Every op on one random forest, with shapes and options that change with the seed."""
    forest, vocab = random_forest(seed, sizes), sizes.vocab
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query_heads, key_heads, head_dim = sizes.heads[seed % len(sizes.heads)]
    kind = int(rng.integers(4))
    options: AttentionOptions = {
        "window": 9 if kind == 1 else None,
        "chunk": 7 if kind == 2 else None,
        "softcap": [None, 1.5][int(rng.integers(2))],
    }
    value_dim, sinks = head_dim - [0, 0, 4][int(rng.integers(3))], [leaf(query_heads)][: int(rng.integers(2))]
    nodes = torch.from_numpy(forest.node_index)
    yield Problem(
        "tree_attention",
        attention.BACKENDS,
        [
            leaf(forest.num_nodes, query_heads, head_dim),
            leaf(forest.num_nodes, key_heads, head_dim),
            leaf(forest.num_nodes, key_heads, value_dim),
            *sinks,
        ],
        lambda x, backend: [
            tree_attention(
                x[0], x[1], x[2], forest.subtree_end, positions=forest.positions,
                sinks=x[3] if x[3:] else None, backend=backend, **options,
            )[nodes.to(x[0].device)]
        ],
        lambda x: [
            attention_of_rollouts(x[0], x[1], x[2], forest, sinks=x[3] if x[3:] else None, **options)
        ],
        lambda w, x, dtype: attention_magnitudes(
            x[0], x[1], x[2], forest, w[0], scale=None, dtype=dtype,
            sinks=x[3] if x[3:] else None, **options,
        ),
        max(head_dim, forest.num_tokens * query_heads // key_heads),
    )  # fmt: skip

    edges = np.flatnonzero(forest.parent >= 0)
    targets, rows = forest.tokens[edges], forest.parent[edges]
    temperature, softcap = float(rng.choice([1.0, 0.7])), [None, 4.0][seed % 2]
    hidden, weight = leaf(forest.num_nodes, head_dim), leaf(vocab, head_dim)
    yield Problem(
        "linear_logprob",
        logprob.BACKENDS,
        [hidden, weight, leaf(vocab)],
        lambda x, backend: linear_logprob(
            x[0], x[1], targets,
            rows=rows, bias=x[2], temperature=temperature, softcap=softcap,
            return_entropy=True, backend=backend,
        ),
        lambda x: logprobs_of_edges(
            x[0], x[1], targets.tolist(), rows.tolist(),
            bias=x[2], temperature=temperature, softcap=softcap,
        ),
        lambda w, x, dtype: logprob_magnitudes(
            x[0], x[1], torch.from_numpy(targets), torch.from_numpy(rows), w[0], w[1],
            bias=x[2], temperature=temperature, softcap=softcap, dtype=dtype,
        ),
        max(len(targets), forest.num_nodes, vocab),
    )  # fmt: skip

    pairs = rng.integers(forest.num_rollouts, size=(6, 2))
    choice = rng.choice([0.0, 0.5, 1.0], size=6)
    pair_list, choices = [(int(i), int(j)) for i, j in pairs], choice.tolist()
    reference = leaf(forest.num_tokens)
    mask, cu_seqlens = forest.trained, forest.cu_seqlens
    yield Problem(
        "pairwise_preference_loss",
        preference.BACKENDS,
        [leaf(forest.num_tokens)],
        lambda x, backend: [
            pairwise_preference_loss(
                x[0], reference.to(x[0]), mask, cu_seqlens, pairs, choice, beta=0.1, backend=backend
            )
        ],
        lambda x: [
            preference_loss_of_pairs(
                x[0], reference, mask.tolist(), cu_seqlens.tolist(), pair_list, choices, beta=0.1
            )
        ],
        lambda w, x, dtype: preference_magnitudes(
            x[0].detach(), x[0].detach().abs() + reference.abs(), reference, forest, pair_list, choices, w[0],
            beta=0.1,
        ),
        forest.num_tokens,
    )  # fmt: skip
    yield Problem(
        "forest_preference_loss",
        preference.BACKENDS,
        [hidden, weight],
        lambda x, backend: [
            forest_preference_loss(
                x[0],
                x[1],
                forest,
                pairs,
                choice,
                reference_logprobs=reference.to(x[0].device, result_dtype(x[0])),
                beta=0.1,
                backend=backend,
            )
        ],
        lambda x: [
            preference_loss_of_rollouts(
                x[0], x[1], forest, pair_list, choices, reference_logprobs=reference, beta=0.1
            )
        ],
        lambda w, x, dtype: forest_preference_magnitudes(
            x[0], x[1], forest, pair_list, choices, w[0], reference=reference, beta=0.1, dtype=dtype
        ),
        max(forest.num_tokens, vocab),
    )
    start, advantages, kl_reference = (leaf(forest.num_tokens) for _ in range(3))
    weights = torch.from_numpy(mask).double()
    yield Problem(
        "clipped_surrogate",
        surrogate.BACKENDS,
        [leaf(forest.num_tokens)],
        lambda x, backend: [
            clipped_surrogate(
                x[0], start.to(x[0]), advantages.to(x[0]), weights.to(x[0]),
                reference_logprobs=kl_reference.to(x[0]),
                clip_low=0.2, clip_high=0.25, kl_weight=0.1, backend=backend,
            )
        ],
        lambda x: [
            surrogate_of_tokens(
                x[0], start.tolist(), advantages.tolist(), weights.tolist(), kl_reference.tolist(),
                clip_low=0.2, clip_high=0.25, kl_weight=0.1,
            )
        ],
        lambda w, x, dtype: surrogate_magnitudes(
            x[0], start, advantages, weights, kl_reference, w[0],
            clip_low=0.2, clip_high=0.25, kl_weight=0.1, dtype=dtype,
        ),
        1,
    )  # fmt: skip


class Guarded:
    """An input between NaNs: what reads past its ends computes NaN, what writes there is found out."""

    def __init__(self, value: torch.Tensor, device: str, dtype: torch.dtype) -> None:
        self._given = value.to(device=device, dtype=dtype, copy=True)
        self._buffer = torch.full((value.numel() + 2 * GUARD,), torch.nan, device=device, dtype=dtype)
        self._inside = self._buffer[GUARD : GUARD + value.numel()].view(value.shape)
        self._inside.copy_(self._given)
        self.leaf = self._inside.detach().requires_grad_()

    def untouched(self) -> bool:
        ends = torch.cat([self._buffer[:GUARD], self._buffer[-GUARD:]])
        return bool(ends.isnan().all()) and torch.equal(self._inside, self._given)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated without a value holds NaN: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are not deterministic
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


def worst_element(problem: Problem, backend: str, device: str, dtype: torch.dtype, seed: int) -> Worst:
    """Of all results and gradients in this dtype on this device; log-probs and biases are at least fp32."""
    guarded = [
        Guarded(x, device, torch.float32 if x.ndim == 1 and dtype in HALVES else dtype)
        for x in problem.leaves
    ]
    leaves = [x.leaf for x in guarded]
    # The oracle sees the rounded inputs, so that only the op's own error is measured.
    exact = [x.detach().double().cpu().requires_grad_() for x in leaves]
    expected = problem.oracle(exact)
    weights = weighting(expected, seed)
    magnitudes = problem.magnitudes(weights, exact, dtype)
    with poisoned_memory():
        results = problem.call(leaves, backend)
        off = worst_of(results, leaves, expected, exact, weights, magnitudes, problem.terms)
    if not all(x.untouched() for x in guarded):
        return Worst(float("inf"))
    return max(off, key=lambda x: x.share)


Line = tuple[str, str, str, str]  # op, backend, device, dtype


def check_references(forests: int) -> bool:
    """Every PyTorch backend, forward and backward in fp64 and fp32; prints the table.

    True if every line keeps its limit.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines: dict[Line, Worst] = {}
    for seed in range(forests):
        for problem in problems(seed, SMALL if seed % 3 else LARGE):
            for device in devices:
                for backend, runs_on in problem.backends.items():
                    if backend in KERNEL_BACKENDS or (runs_on is not None and device not in runs_on):
                        continue
                    for dtype in (torch.float64, torch.float32):
                        _measure(lines, problem, backend, device, dtype, seed)
    return _print_table(lines)


def check_device(
    forests: int,
    device: str = "cuda",
    dtypes: Iterable[torch.dtype] = (torch.float32, *HALVES),
    sizes: Sizes = ON_DEVICE,
) -> bool:
    """Every Triton op on the device, forward and backward; prints the table.

    Inputs lie between NaNs, which must be neither read nor written, and uninitialised memory holds NaN. A
    shape without a tile on this GPU is named and left out. True if every line keeps its limit and each op
    has one.
    """
    lines: dict[Line, Worst] = {}
    refused: dict[str, None] = {}
    ops = set()
    for seed in range(forests):
        for problem in problems(seed, sizes):
            ops.add(problem.op)
            for dtype in dtypes:
                if dtype in HALVES and all(x.ndim == 1 for x in problem.leaves):
                    continue  # it takes log-probs, which are fp32
                try:
                    _measure(lines, problem, "triton", device, dtype, seed)
                except ValueError as error:
                    if "no tile" not in str(error):
                        raise
                    refused[str(error)] = None
    ok = _print_table(lines)
    for message in refused:
        print(f"not run: {message}")
    for op in sorted(ops - {line[0] for line in lines}):
        print(f"{op}: has no kernel for this device in any dtype")
        ok = False
    return ok


def _measure(
    lines: dict[Line, Worst], problem: Problem, backend: str, device: str, dtype: torch.dtype, seed: int
) -> None:
    off = worst_element(problem, backend, device, dtype, seed)
    line = (problem.op, backend, device, str(dtype).removeprefix("torch."))
    lines[line] = max(lines.get(line, off), off, key=lambda x: x.share)


def _print_table(lines: dict[Line, Worst]) -> bool:
    """One row a line; True if every line keeps its limit."""
    print(f"{'op':<26}{'backend':<11}{'device':<8}{'dtype':<9}{'error':>9}{'allowed':>9}{'share':>7}  ok")
    for (op, backend, device, dtype), x in sorted(lines.items()):
        print(
            f"{op:<26}{backend:<11}{device:<8}{dtype:<9}{x.error:>9.1e}{x.allowed:>9.1e}{x.share:>7.0%}"
            f"  {'yes' if x.share <= 1 else 'NO'}"
        )
    return all(x.share <= 1 for x in lines.values())
