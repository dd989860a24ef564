"""Timings of the kernels on a CUDA device beside other implementations: the second half of layer `device`.

Each row is one implementation of one op on one forest: the median of synchronised runs with their spread,
TFLOP/s of the work that the mask asks for, its share of the device's roofline, and the time over ours. An
implementation that computes more than the mask asks for (a dense mask, gathered keys) is charged for it by
being slower, not by being credited for more work. Nothing of this file has been run on a GPU yet.
"""

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mosaic_kernels.attention import tree_attention
from mosaic_kernels.forest import PackedForest, pack_forest
from mosaic_kernels.logprob import linear_logprob

REPEATS, WARMUPS = 20, 3
RUNS_TOO_LONG_MS = 2_000.0  # an implementation slower than this is timed once

# Dense bf16 tensor-core TFLOP/s, from the vendors' data sheets, by the start of the device's name.
PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
    "AMD Instinct MI300X": 1307.0,
}

Run = Callable[[], object]
Timer = Callable[[Run], "Spread"]


@dataclass(frozen=True)
class Spread:
    """Milliseconds of several runs."""

    median_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class Row:
    """One implementation's time for one piece of work; the first row of a piece is ours."""

    work: str  # "attention forward, trunk and 8 branches"
    implementation: str
    spread: Spread | None
    flops: float  # what the mask asks for
    note: str = ""  # why there is no time


def print_timings() -> bool:
    """Print the table for this machine's first CUDA device. True: a table has no verdict."""
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; medians of {REPEATS} runs")
    rows = [*attention_rows(cuda_timer), *logprob_rows(cuda_timer)]
    for line in table(rows, peak_tflops(name)):
        print(line)
    return True


def peak_tflops(device_name: str) -> float | None:
    """The dense bf16 peak, or None for a device that is not listed. Longest name first."""
    names = sorted(PEAK_TFLOPS, key=len, reverse=True)
    return next((PEAK_TFLOPS[one] for one in names if device_name.startswith(one)), None)


def table(rows: Sequence[Row], peak: float | None) -> Iterator[str]:
    """The table's lines. A row's last column is its time over that of the first row of the same work."""
    yield (
        f"{'work':<44}{'implementation':<22}{'median ms':>10}{'spread':>16}{'TFLOP/s':>9}{'of peak':>9}"
        f"{'/ ours':>8}"
    )
    ours: dict[str, Spread] = {}
    for row in rows:
        start = f"{row.work:<44}{row.implementation:<22}"
        if row.spread is None:
            yield f"{start}{row.note}"
            continue
        first = ours.setdefault(row.work, row.spread)
        rate = row.flops / row.spread.median_ms / 1e9
        share = "" if peak is None else f"{rate / peak:.1%}"
        yield (
            f"{start}{row.spread.median_ms:>10.3f}{row.spread.low_ms:>8.3f}-{row.spread.high_ms:<7.3f}"
            f"{rate:>9.1f}{share:>9}{row.spread.median_ms / first.median_ms:>7.2f}x"
        )


def cuda_timer(run: Run) -> Spread:
    """Median, least and most of synchronised runs, by CUDA events, after warm-up."""
    times: list[float] = []
    for repeat in range(WARMUPS + REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        if repeat >= WARMUPS or start.elapsed_time(stop) > RUNS_TOO_LONG_MS:
            times.append(start.elapsed_time(stop))
        if times and times[-1] > RUNS_TOO_LONG_MS:
            break
    return Spread(statistics.median(times), min(times), max(times))


def attention_flops(forest: PackedForest, query_heads: int, head_dim: int, *, backward: bool) -> float:
    """Floating-point operations on the visible pairs: 2 products of D forward, 5 backward, 2 each.

    Example: one chain of 3 tokens has 6 visible pairs; forward with 1 head of 64: 4 * 64 * 6.
    """
    pairs = float((forest.positions + 1).sum())  # a token sees its depth and itself
    return 2.0 * (5 if backward else 2) * head_dim * query_heads * pairs


def timed_forests() -> Iterator[tuple[str, PackedForest]]:
    """What a step of training looks like: one long trunk, forks at steps, and nothing shared."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return rng.integers(2**31, size=count).tolist()

    trunk = draw(2048)
    yield "2,048 shared, 8 branches of 1,024", pack_forest([trunk + draw(1024) for _ in range(8)])
    steps: list[list[int]] = [draw(1024)]
    for _ in range(15):
        parent = steps[int(rng.integers(len(steps)))]
        steps.append(parent[: 1024 + int(rng.integers(len(parent) - 1023))] + draw(512))
    yield "1,024 shared, 16 forking at steps", pack_forest(steps)
    yield "4 of 4,096, nothing shared", pack_forest([draw(4096) for _ in range(4)])


def attention_rows(timer: Timer, device: str = "cuda") -> Iterator[Row]:
    """Forward and forward with backward of every backend that is installed, and of SDPA with a dense mask."""
    query_heads, key_heads, head_dim = 32, 8, 128
    for name, forest in timed_forests():
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(forest.num_nodes, heads, head_dim, generator=generator)
            .to(device, torch.bfloat16)
            .requires_grad_()
            for heads in (query_heads, key_heads, key_heads)
        )
        end = torch.from_numpy(forest.subtree_end).to(device)
        for backward in (False, True):
            work = f"{'both' if backward else 'forward'}: {name}"
            flops = attention_flops(forest, query_heads, head_dim, backward=False)
            if backward:
                flops += attention_flops(forest, query_heads, head_dim, backward=True)
            for implementation, attend in _attention_implementations(end):
                if isinstance(attend, str):
                    yield Row(work, implementation, None, flops, attend)
                    continue
                yield _timed(work, implementation, _run(attend, q, k, v, backward), flops, timer)


def logprob_rows(
    timer: Timer, device: str = "cuda", *, rows: int = 8192, size: int = 4096, vocabulary: int = 151_936
) -> Iterator[Row]:
    """Log-probs of one target a row, and the gradients of hidden and weight: 3 products of the three sizes.

    The recomputation that spares the logits is not credited: with it ours makes 4 products.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, size), (vocabulary, size))
    hidden, weight = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()
        for shape in shapes
    )
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    product = 2.0 * rows * size * vocabulary
    work = f"log-probs: {rows:,} rows, {size:,} by {vocabulary:,}"
    for implementation, sum_of_logprobs in _logprob_implementations(targets):
        if isinstance(sum_of_logprobs, str):
            yield Row(work, implementation, None, 3 * product, sum_of_logprobs)
            continue

        def both(run: SumOfLogprobs = sum_of_logprobs) -> object:
            return torch.autograd.grad(run(hidden, weight), (hidden, weight))

        yield _timed(work, implementation, both, 3 * product, timer)


SumOfLogprobs = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _logprob_implementations(targets: torch.Tensor) -> Iterator[tuple[str, SumOfLogprobs | str]]:
    """Each name with its sum of log-probs, or with the reason it is missing. Ours first."""
    yield "triton (ours)", lambda h, w: linear_logprob(h, w, targets, backend="triton").sum()
    yield "chunked", lambda h, w: linear_logprob(h, w, targets, backend="chunked").sum()
    if importlib.util.find_spec("liger_kernel") is None:
        yield "Liger", "liger-kernel is not installed"
    else:
        liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
            reduction="sum"
        )
        yield "Liger", lambda h, w: -liger(w, h, targets)
    if importlib.util.find_spec("cut_cross_entropy") is None:
        yield "cut-cross-entropy", "cut-cross-entropy is not installed"
    else:
        cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        yield "cut-cross-entropy", lambda h, w: -cut(h, w, targets, reduction="sum")
    yield (
        "torch, all logits",
        lambda h, w: -torch.nn.functional.cross_entropy((h @ w.T).float(), targets, reduction="sum"),
    )


def _timed(work: str, implementation: str, run: Run, flops: float, timer: Timer) -> Row:
    try:
        return Row(work, implementation, timer(run), flops)
    except torch.OutOfMemoryError:
        return Row(work, implementation, None, flops, "out of memory")


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _attention_implementations(end: torch.Tensor) -> Iterator[tuple[str, Attend | str]]:
    """Each name with its function, or with the reason it is missing. Ours first."""
    yield "triton (ours)", lambda q, k, v: tree_attention(q, k, v, end, backend="triton")
    yield "flex", lambda q, k, v: tree_attention(q, k, v, end, backend="flex")
    if importlib.util.find_spec("flash_attn") is None:
        yield "flash, K/V gathered", "flash-attn is not installed"
    else:
        yield "flash, K/V gathered", lambda q, k, v: tree_attention(q, k, v, end, backend="flash")
    node = torch.arange(len(end), device=end.device)
    visible = (node[None, :] <= node[:, None]) & (node[:, None] < end[None, :])

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            heads_first[0], heads_first[1], heads_first[2], attn_mask=visible, enable_gqa=True
        )
        return out.squeeze(0).transpose(0, 1)

    yield "SDPA, dense mask", sdpa


def _run(attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backward: bool) -> Run:
    grad = q.detach().roll(1, 0)  # dense, as a model's is: a sum's would be one number, expanded

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    def both() -> Sequence[torch.Tensor]:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

    return both if backward else forward
