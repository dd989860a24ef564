"""logprob: log-probs from hidden states, forward and backward, against full logits.

                              CPU: with entropies                      CUDA: without
    logprob                   1,024 rows of 384, 8,192 tokens          8,192 rows of 4,096, 151,936 tokens
    logprob:large_vocabulary  256 rows of 512, 151,936 tokens          16,384 rows of 2,048, 262,144 tokens

    ours       linear_logprob, the backend of this device: on a CPU a chunk of rows at a time
    flat       F.linear, log_softmax (and the entropy), all logits in memory; log_softmax in fp32
    chunked    CUDA: linear_logprob, a chunk of rows at a time in PyTorch
    liger      CUDA: Liger's fused linear cross-entropy
    cce        CUDA: cut-cross-entropy as it comes: gradients of tokens of small probability are left out
    cce_exact  CUDA: the same without that filter

ideal = 1: all compute the same products. Operations: 3 products of 2 x rows x hidden x vocabulary; logits
computed again are not credited. Bytes: hidden states, weight and their gradients once each, what no way can
avoid.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from agreement import Expected, Missing, missing_of
from device import Place
from measure import Result, compare
from peer import package_missing
from torch import Tensor

from mosaic_kernels import linear_logprob

FORMULA = "ideal = 1 (the same matrix products)"

SHAPES = {"logprob": (1024, 384, 8192), "logprob:large_vocabulary": (256, 512, 151_936)}
REAL_SHAPES = {"logprob": (8_192, 4_096, 151_936), "logprob:large_vocabulary": (16_384, 2_048, 262_144)}
"""Rows, hidden size, vocabulary."""
VARIANTS = DEFAULT = tuple(SHAPES)
SECONDS = {"logprob": 5, "logprob:large_vocabulary": 27}
QUICK = ("logprob",)
ON_CPU = False
CHECKED_ROWS = 32  # on a CPU; on CUDA 512
_FP64_ROWS = 64  # whose logits are in memory at a time

LogProbs = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


def shape_of(name: str, place: Place) -> tuple[int, int, int]:
    return (REAL_SHAPES if place.real else SHAPES)[name]


def inputs(name: str, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N]."""
    rows, size, vocabulary = shape_of(name, place)
    hidden = place.randn(rows, size, seed=0)
    weight = place.randn(vocabulary, size, seed=1).div_(size**0.5)
    return hidden, weight, place.randint(vocabulary, rows, seed=2)


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(F.linear(hidden, weight), -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return linear_logprob(hidden, weight, targets, return_entropy=True)


CONTENDERS = {"ours": ours, "flat": full}  # CPU


def real_contenders() -> tuple[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]], Missing]:
    """From hidden, weight and targets to the sum of log-probs (Liger computes no others' gradients)."""

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        module = importlib.import_module("liger_kernel.transformers")
        return -module.LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)

    def cut(hidden: Tensor, weight: Tensor, targets: Tensor, **options: object) -> Tensor:
        module = importlib.import_module("cut_cross_entropy")
        return -module.linear_cross_entropy(hidden, weight, targets, reduction="sum", **options)

    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": lambda h, w, t: linear_logprob(h, w, t).sum(),
        "flat": cross_entropy,
        "chunked": lambda h, w, t: linear_logprob(h, w, t, backend="chunked").sum(),
        "liger": liger,
        "cce": cut,
        "cce_exact": lambda h, w, t: cut(h, w, t, filter_eps=None),
    }
    missing = {one: why for one in found if (why := package_missing(one))}
    return {one: run for one, run in found.items() if one not in missing}, missing


def ideal(name: str) -> float:
    return 1.0


def contenders_of(place: Place) -> tuple[dict[str, LogProbs], Missing]:
    """Results by name: log-probs and entropies, or the sum of log-probs; gradients of hidden and weight."""

    def with_entropy(run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> LogProbs:
        def results(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
            leaves = hidden.requires_grad_(), weight.requires_grad_()
            logprobs, entropy = run(*leaves, targets)
            gradients = torch.autograd.grad(logprobs.sum(), leaves)
            return dict(
                zip(("log-probs", "entropy", *_GRADIENTS), (logprobs, entropy, *gradients), strict=True)
            )

        return results

    def of_sum(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LogProbs:
        def results(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
            leaves = hidden.requires_grad_(), weight.requires_grad_()
            total = run(*leaves, targets)
            return dict(zip(("sum", *_GRADIENTS), (total, *torch.autograd.grad(total, leaves)), strict=True))

        return results

    if not place.real:
        return {one: with_entropy(run) for one, run in CONTENDERS.items()}, {}
    found, missing = real_contenders()
    return {one: of_sum(run) for one, run in found.items()}, missing


_GRADIENTS = ("d hidden", "d weight")


def exact_results(
    hidden: Tensor, weight: Tensor, targets: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """In fp64, full logits of a few rows at a time; names: which of log-probs, entropy, sum, gradients."""
    parts: dict[str, list[Tensor]] = {"log-probs": [], "entropy": [], "d hidden": []}
    wide = weight.detach().double().requires_grad_()
    d_weight = torch.zeros_like(wide)
    for rows, its_targets in zip(hidden.detach().split(_FP64_ROWS), targets.split(_FP64_ROWS), strict=True):
        leaf = rows.double().requires_grad_()
        logprobs, entropy = full(leaf, wide, its_targets)
        d_hidden, d_its_weight = torch.autograd.grad(logprobs.sum(), (leaf, wide))
        d_weight += d_its_weight
        for key, value in zip(parts, (logprobs, entropy, d_hidden), strict=True):
            parts[key].append(value.detach())
    found = {key: torch.cat(values) for key, values in parts.items()}
    found |= {"sum": found["log-probs"].sum(), "d weight": d_weight}
    return {name: found[name] for name in names}


def check(name: str, quick: bool, place: Place) -> Missing:
    """Every contender against full logits in fp64, on the first rows."""
    hidden, weight, targets = inputs(name, place)
    rows = min(len(hidden), 16 * CHECKED_ROWS if place.real else CHECKED_ROWS)
    hidden, targets = hidden[:rows], targets[:rows]
    contenders, missing = contenders_of(place)

    def results(one: str) -> dict[str, Tensor]:
        return contenders[one](hidden.clone(), weight.clone(), targets)

    flat = results("flat")
    bf16 = place.dtype != torch.float32
    expected = Expected(exact_results(hidden, weight, targets, tuple(flat)), flat if bf16 else None)
    return missing | missing_of(
        contenders, lambda one: expected.check(one, results(one)), trusted=("flat",) if bf16 else ()
    )


def run(name: str, quick: bool, place: Place, missing: Missing) -> Result:
    hidden, weight, targets = inputs(name, place)
    rows, size, vocabulary = shape_of(name, place)
    contenders = {
        one: lambda run=run: run(hidden, weight, targets)
        for one, run in contenders_of(place)[0].items()
        if one not in missing
    }
    return compare(
        contenders,
        repeats=20 if place.real else 5,
        budget_s=12.0,
        ideal=ideal(name),
        extra={
            "raw_tokens": rows,
            "unique_tokens": rows,
            "gflop": 6e-9 * rows * size * vocabulary,
            "gbyte": 2e-9 * hidden.element_size() * (hidden.numel() + weight.numel()),
        },
        peaks=tuple(contenders),
        not_run=missing,
        place=place,
    )
