"""scaling: how the cost of a training step grows, one axis at a time; the step of `step`, in small.

    scaling:sharing-N   N% of all rollout tokens are shared (1 - unique / raw): 32 rollouts of 96 tokens,
                        20 M parameters; the rollouts' own tokens are trained
    scaling:tokens-N    about N rollout tokens: 4 rollouts, three quarters of each shared
    scaling:group-N     N rollouts of 256 shared and 32 own tokens
    scaling:depth-N     16 rollouts of 64 shared and 128 other tokens, in a binary tree of N levels
    scaling:suffix-N    8 rollouts of 256 shared and N own tokens

All but the first axis: a Qwen3 model of 3 M parameters. `scaling:sharing` runs one axis.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import trl_peer
from contenders import (
    check_gradients,
    check_same,
    gradients,
    model_gflop,
    step_contenders,
    token_weights,
    with_steps,
)
from measure import Result, compare
from workloads import Workload, drawn, qwen3

from mosaic_kernels import ideal_speedup

FORMULA = "as of step"

AXES = {
    "sharing": (0, 20, 40, 60, 80, 90, 95),
    "tokens": (512, 1024, 2048, 4096),
    "group": (2, 8, 32),
    "depth": (1, 2, 4, 8),
    "suffix": (2, 8, 32, 128),
}
VARIANTS = tuple(f"scaling:{axis}-{value}" for axis, values in AXES.items() for value in values)
DEFAULT = tuple(
    f"scaling:{one}"
    for one in ("sharing-0", "sharing-60", "sharing-95", "tokens-2048", "group-8", "depth-4", "suffix-32")
)
QUICK = ("scaling:suffix-8",)

_ROLLOUTS, _LENGTH = 32, 96  # of the sharing axis


def _sharing(percent: int) -> Workload:
    """Prompt length for which 1 - unique / raw is nearest to the share: p (R - 1) / (R L)."""
    prompt = round(percent / 100 * _LENGTH * _ROLLOUTS / (_ROLLOUTS - 1))
    return drawn(prompt, _ROLLOUTS, _LENGTH - prompt)


def _small() -> Callable[..., Workload]:
    model = qwen3(layers=4, hidden=256, vocabulary=4096)
    return lambda shared, rollouts, own, depth=1: drawn(shared, rollouts, own, model=model, depth=depth)


def workload(name: str) -> Workload:
    axis, _, value = name.partition(":")[2].partition("-")
    n = int(value)
    match axis:
        case "sharing":
            return _sharing(n)
        case "tokens":
            return _small()(n * 3 // 16, 4, n // 16)
        case "group":
            return _small()(256, n, 32)
        case "depth":
            return _small()(64, 16, 128, depth=n)
        case _:
            return _small()(256, 8, n)


def chosen(name: str) -> tuple[str, ...]:
    """Whoever shares, on the axis of sharing; whoever packs, where it begins; elsewhere the flat batch."""
    packing = ("packed", "alone") if name == "scaling:sharing-0" else ()
    return ("ours", "flat", "gather", *packing) if ":sharing-" in name else ("ours", "flat")


def check(name: str, quick: bool) -> None:
    """Every gradient of every contender equals the flat batch's, fp32, 1e-4 of each gradient's norm."""
    work = workload(name)
    backwards = step_contenders(work, token_weights(work))
    check_gradients(work.model, {one: backwards[one] for one in chosen(name)})


def ideal(work: Workload) -> float:
    return ideal_speedup(work.forest, work.model.config)


def run(name: str, quick: bool) -> Result:
    work = workload(name)
    model, forest, weights = work.model, work.forest, token_weights(work)
    backwards = step_contenders(work, weights)
    contenders = with_steps(model, {one: backwards[one] for one in chosen(name)})
    with ExitStack() as stack:
        if ":sharing-" in name and trl_peer.installed() and not quick:
            peer = stack.enter_context(trl_peer.grpo(work, weights))
            check_same("trl", peer.gradients(), gradients(model, backwards["flat"]))
            contenders["trl"] = peer.step
        return compare(
            contenders,
            repeats=3,
            ideal=ideal(work),
            extra={
                "raw_tokens": forest.num_tokens,
                "unique_tokens": forest.num_nodes,
                "raw_over_unique": forest.num_tokens / forest.num_nodes,
                "sharing_frac": 1 - forest.num_nodes / forest.num_tokens,
                "gflop": model_gflop(work, forest),
            },
            warm=False,
        )
