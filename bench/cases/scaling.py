"""scaling: how the cost of a training step grows, one axis at a time; the step of `step`, in small.

    scaling:sharing-N   N% of all rollout tokens are shared (1 - unique / raw): 32 rollouts of 256 tokens with
                        one prompt; the rollouts' own tokens are trained
    scaling:short-N     the same with rollouts of 96 tokens, through a model of 20 M parameters
    scaling:tokens-N    about N rollout tokens: 4 rollouts, three quarters of each shared
    scaling:group-N     N rollouts of 256 shared and 32 own tokens
    scaling:depth-N     16 rollouts of 64 shared and 128 other tokens, in a binary tree of N levels
    scaling:suffix-N    8 rollouts of 256 shared and N own tokens

All but `short`: a Qwen3 model of 3 M parameters (3 layers of 256). `scaling:sharing` runs one axis. The ideal
is that of `step`.
"""

from __future__ import annotations

from contextlib import ExitStack

import trl_peer
from contenders import (
    check_gradients,
    gradients,
    model_gflop,
    step_contenders,
    token_weights,
    with_steps,
)
from measure import Result, compare
from workloads import Workload, drawn, qwen3, small_qwen3

from cases.step import FORMULA as FORMULA
from mosaic_kernels import ideal_speedup

AXES = {
    "sharing": (0, 20, 40, 60, 80, 90, 95),
    "short": (0, 20, 40, 60, 80, 90, 95),
    "tokens": (512, 1024, 2048, 4096),
    "group": (2, 8, 32),
    "depth": (1, 2, 4, 8),
    "suffix": (2, 8, 32, 128),
}
VARIANTS = tuple(f"scaling:{axis}-{value}" for axis, values in AXES.items() for value in values)
DEFAULT = tuple(
    f"scaling:{one}"
    for one in ("sharing-0", "sharing-60", "sharing-95", "tokens-1024", "group-8", "depth-4", "suffix-32")
)
QUICK = ("scaling:suffix-8",)
SECONDS = {one: 28 if ":sharing-" in one else 60 if ":short-" in one else 6 for one in VARIANTS}

_ROLLOUTS = 32  # of the axes of sharing


def prompt_tokens(percent: int, length: int) -> int:
    """Prompt length for which 1 - unique / raw is nearest to the share: p (R - 1) / (R L)."""
    return round(percent / 100 * length * _ROLLOUTS / (_ROLLOUTS - 1))


def workload(name: str) -> Workload:
    axis, _, value = name.partition(":")[2].partition("-")
    n = int(value)
    model = qwen3() if axis == "short" else small_qwen3()
    match axis:
        case "sharing" | "short":
            length = 96 if axis == "short" else 256
            prompt = prompt_tokens(n, length)
            return drawn(prompt, _ROLLOUTS, length - prompt, model=model)
        case "tokens":
            return drawn(n * 3 // 16, 4, n // 16, model=model)
        case "group":
            return drawn(256, n, 32, model=model)
        case "depth":
            return drawn(64, 16, 128, model=model, depth=n)
        case _:
            return drawn(256, 8, n, model=model)


def _is_of_sharing(name: str) -> bool:
    return name.startswith(("scaling:sharing-", "scaling:short-"))


def chosen(name: str) -> tuple[str, ...]:
    """Whoever shares, on the axes of sharing; whoever packs, on that of tokens; elsewhere the flat batch."""
    if _is_of_sharing(name):
        return ("ours", "flat", "gather")
    return ("ours", "flat", "packed", "alone") if ":tokens-" in name else ("ours", "flat")


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
        not_run: dict[str, str] = {}
        if _is_of_sharing(name) and not quick:
            trl = trl_peer.grpo(work, weights)
            not_run = trl_peer.join(contenders, stack, trl, gradients(model, backwards["ours"]))
        return compare(
            contenders,
            repeats=5,
            budget_s=16.0 if _is_of_sharing(name) else 5.0,
            ideal=ideal(work),
            extra={
                "raw_tokens": forest.num_tokens,
                "unique_tokens": forest.num_nodes,
                "raw_over_unique": forest.num_tokens / forest.num_nodes,
                "sharing_frac": 1 - forest.num_nodes / forest.num_tokens,
                "gflop": model_gflop(work, forest),
            },
            warm=False,
            not_run=not_run,
        )
