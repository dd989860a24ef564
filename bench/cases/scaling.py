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

On CUDA a model of the shape of Qwen3-1.7B, flat batches of 16,000 tokens and more: rollouts of 512 tokens
(`short`: 128), 4 times the tokens of `tokens`, 384 shared and 128 own tokens in `group`, 128 shared and 896
others in `depth`, 1,536 shared in `suffix`.
"""

from __future__ import annotations

from contextlib import ExitStack

import trl_peer
from agreement import Expected, Missing
from contenders import gradients, model_gflop, step_contenders, token_weights, with_steps
from device import Place
from measure import Result, compare
from workloads import Workload, drawn, qwen3, real_qwen3, small_qwen3

from cases.step import FORMULA as FORMULA
from cases.step import check_steps
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
SECONDS = {one: 36 if ":sharing-" in one else 60 if ":short-" in one else 6 for one in VARIANTS}

ON_CPU = False

_ROLLOUTS: int = 32  # of the axes of sharing
LENGTHS, REAL_LENGTHS = {"sharing": 256, "short": 96}, {"sharing": 512, "short": 128}


def prompt_tokens(percent: int, length: int) -> int:
    """Prompt length for which 1 - unique / raw is nearest to the share: p (R - 1) / (R L)."""
    return round(percent / 100 * length * _ROLLOUTS / (_ROLLOUTS - 1))


def workload(name: str, place: Place) -> Workload:
    axis, _, value = name.partition(":")[2].partition("-")
    n = int(value)
    if place.real:
        model = real_qwen3(place)
    else:
        model = qwen3() if axis == "short" else small_qwen3()
    match axis:
        case "sharing" | "short":
            lengths = REAL_LENGTHS if place.real else LENGTHS
            prompt = prompt_tokens(n, lengths[axis])
            return drawn(prompt, _ROLLOUTS, lengths[axis] - prompt, model=model)
        case "tokens":
            n *= 4 if place.real else 1
            return drawn(n * 3 // 16, 4, n // 16, model=model)
        case "group":
            shared, own = (384, 128) if place.real else (256, 32)
            return drawn(shared, n, own, model=model)
        case "depth":
            shared, own = (128, 896) if place.real else (64, 128)
            return drawn(shared, 16, own, model=model, depth=n)
        case _:
            return drawn(1_536 if place.real else 256, 8, n, model=model)


def _is_of_sharing(name: str) -> bool:
    return name.startswith(("scaling:sharing-", "scaling:short-"))


def chosen(name: str, place: Place) -> tuple[str, ...]:
    """The contenders of a variant: who shares, on the axes of sharing; who packs, on that of tokens."""
    if _is_of_sharing(name):
        return ("ours", "flat", "gather", *(("varlen", "flash") if place.real else ()))
    if ":tokens-" in name:
        return ("ours", "flat", "packed", "alone", *(("flat_flash", "packed_flash") if place.real else ()))
    return ("ours", "flat")


def check(name: str, quick: bool, place: Place) -> Missing:
    """Every gradient of every contender equals the flat batch's (bench/agreement.py)."""
    return check_steps(workload(name, place), chosen(name, place))


def ideal(work: Workload) -> float:
    return ideal_speedup(work.forest, work.model.config)


def run(name: str, quick: bool, place: Place, missing: Missing) -> Result:
    work = workload(name, place)
    model, forest, weights = work.model, work.forest, token_weights(work)
    backwards = step_contenders(work, weights)
    contenders = with_steps(model, {one: backwards[one] for one in chosen(name, place) if one not in missing})
    with ExitStack() as stack:
        if _is_of_sharing(name) and not quick and not place.real:
            trl = trl_peer.grpo(work, weights)
            expected = Expected(gradients(model, backwards["ours"]))
            missing |= trl_peer.join(contenders, stack, trl, expected)
        return compare(
            contenders,
            repeats=5,
            budget_s=24.0 if _is_of_sharing(name) else 5.0,
            ideal=ideal(work),
            extra={
                "raw_tokens": forest.num_tokens,
                "unique_tokens": forest.num_nodes,
                "raw_over_unique": forest.num_tokens / forest.num_nodes,
                "sharing_frac": 1 - forest.num_nodes / forest.num_tokens,
                "gflop": model_gflop(work, forest),
            },
            warm=False,
            not_run=missing,
            place=place,
        )
