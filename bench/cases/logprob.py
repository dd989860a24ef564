"""logprob: log-probs and entropies from hidden states, forward and backward, against full logits.

    logprob                   1,024 rows of 384, 8,192 tokens (the model of `step`)
    logprob:large_vocabulary  256 rows of 512, 151,936 tokens (Qwen3's)

    ours  linear_logprob, the backend of this device: a chunk of rows at a time
    flat  F.linear, log_softmax and the entropy, all logits in memory

ideal = 1: both compute the same products. Operations: 3 products of 2 x rows x hidden x vocabulary. Bytes:
hidden states, weight and their gradients once each, what no way can avoid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from measure import Result, compare
from torch import Tensor

from mosaic_kernels import linear_logprob

FORMULA = "ideal = 1 (the same matrix products)"

SHAPES = {"logprob": (1024, 384, 8192), "logprob:large_vocabulary": (256, 512, 151_936)}
VARIANTS = DEFAULT = tuple(SHAPES)
SECONDS = {"logprob": 5, "logprob:large_vocabulary": 27}
QUICK = ("logprob",)

TOLERANCE = 1e-4  # of the largest value, fp32 against fp64


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], targets [N]."""
    rows, size, vocabulary = SHAPES[name]
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, size, generator=random)
    weight = torch.randn(vocabulary, size, generator=random) / size**0.5
    return hidden, weight, torch.randint(0, vocabulary, (rows,), generator=random)


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(F.linear(hidden, weight), -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return linear_logprob(hidden, weight, targets, return_entropy=True)


CONTENDERS = {"ours": ours, "flat": full}


def ideal(name: str) -> float:
    return 1.0


def _results(one: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Log-probs, entropies and the gradients of the log-probs' sum."""
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = CONTENDERS[one](*leaves, targets)
    return [logprobs, entropy, *torch.autograd.grad(logprobs.sum(), leaves)]


def check(name: str, quick: bool) -> None:
    """Both in fp32 against full logits in fp64, on the first 32 rows."""
    hidden, weight, targets = inputs(name)
    hidden, targets = hidden[:32], targets[:32]
    exact = _results("flat", hidden.double(), weight.double(), targets)
    for one in CONTENDERS:
        found = _results(one, hidden.clone(), weight.clone(), targets)
        for what, a, b in zip(("log-probs", "entropy", "d hidden", "d weight"), found, exact, strict=True):
            error = float(((a - b).abs().max() / b.abs().max()).detach())
            assert error < TOLERANCE, f"{one}: {what} is off by {error:.1e}"


def run(name: str, quick: bool) -> Result:
    hidden, weight, targets = inputs(name)
    rows, size, vocabulary = SHAPES[name]
    return compare(
        {one: lambda one=one: _results(one, hidden, weight, targets) for one in CONTENDERS},
        repeats=5,
        budget_s=12.0,
        ideal=ideal(name),
        extra={
            "raw_tokens": rows,
            "unique_tokens": rows,
            "gflop": 6e-9 * rows * size * vocabulary,
            "gbyte": 8e-9 * (hidden.numel() + weight.numel()),
        },
        peaks=tuple(CONTENDERS),
    )
