"""step: one whole training step (forward, backward, AdamW) on the forest against the padded flat batch.

    step                 rollouts of the embedded default, played by the embedded model (0.8 M parameters)
    step:long_prefix     1,500 shared tokens, 6 rollouts of 250, half of them forking halfway
    step:held            the same with 2,000 tokens a micro-batch; `cut` repeats the prefix instead
    step:many_short      300 shared tokens, 64 rollouts of 30
    step:agent           8 agent trajectories of about 2,100 tokens: 1,700 shared, turns with observations
                         between them, some forking at a turn; lengths as on AgentDojo, tokens random
    step:nothing_shared  5 rollouts of 500, nothing shared
    step:recurrent_60    8 rollouts of 1,000 tokens, 600 of them shared, on a Qwen3.5 model, of whose layers
                         three in four are recurrent
    step:recurrent_90    the same with 900 shared
    step:agentdojo       8 trajectories of an injected task of AgentDojo's banking suite, played from the
                         installed package: 1,437 tokens of prompt, some 2,150 in all. What they are:
                         bench/dojo_rollouts.py; what they need: make bench-agentdojo
    step:agentdojo-benign  the same task without its attack, some 1,980 tokens
    step:agentdojo-slack   another suite: 1,281 tokens of prompt, some 2,200 in all

All but the first: a Qwen3 model of 20 M parameters.

On CUDA a model of the shape of Qwen3-1.7B, whose flat batches of 12,000 to 18,000 tokens fit into 80 GB:

    step                 4 groups of 4 rollouts of 512 shared and 256 own tokens
    step:long_prefix     3,072 shared tokens, 4 rollouts of 1,024, half of them forking halfway
    step:held            the same with 4,000 tokens a micro-batch
    step:many_short      1,024 shared tokens, 15 rollouts of 64
    step:nothing_shared  4 rollouts of 4,096
    others               the same rollouts as on a CPU

Contenders: see bench/contenders.py; `trl` is the step of
TRL's GRPO trainer in .venv-trl. peak is the most memory PyTorch holds during forward and backward, beyond
weights and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import dojo_rollouts
import trl_peer
from agreement import Expected, Missing, missing_of
from contenders import (
    ON_CUDA,
    expected_gradients,
    forest_backward,
    gradients,
    model_gflop,
    padded_loss,
    step_contenders,
    token_weights,
    with_steps,
)
from device import Place
from measure import Result, compare
from peer import package_missing
from transformers import PreTrainedModel
from workloads import Workload, agent, drawn, groups_drawn, played, qwen3_5, real_qwen3

from mosaic_fast.policy import Policy
from mosaic_kernels import ideal_speedup

FORMULA = (
    "ideal = cost of the flat batch / cost of the forest, cost = layers x linear weights x tokens + "
    "2 x layers x heads x head size x visible pairs + hidden x vocabulary x labelled rows"
)

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "step": played,
    "step:long_prefix": lambda: drawn(1_500, 6, 250, fork_halfway=True),
    "step:held": lambda: replace(drawn(1_500, 6, 250, fork_halfway=True), tokens_per_microbatch=2_000),
    "step:many_short": lambda: drawn(300, 64, 30),
    "step:agent": agent,
    "step:nothing_shared": lambda: drawn(0, 5, 500),
    "step:recurrent_60": lambda: drawn(600, 8, 400, model=qwen3_5()),
    "step:recurrent_90": lambda: drawn(900, 8, 100, model=qwen3_5()),
    **{name: partial(dojo_rollouts.workload, settings) for name, settings in dojo_rollouts.TASKS.items()},
}
REAL_WORKLOADS: dict[str, Callable[[PreTrainedModel], Workload]] = {
    "step": lambda model: groups_drawn(model, 4, 512, 4, 256),
    "step:long_prefix": lambda model: drawn(3_072, 4, 1_024, fork_halfway=True, model=model),
    "step:held": lambda model: replace(
        drawn(3_072, 4, 1_024, fork_halfway=True, model=model), tokens_per_microbatch=4_000
    ),
    "step:many_short": lambda model: drawn(1_024, 15, 64, model=model),
    "step:nothing_shared": lambda model: drawn(0, 4, 4_096, model=model),
}
CONTENDERS = {
    "step": ("ours", "flat"),
    "step:held": ("ours", "flat", "cut"),
    "step:nothing_shared": ("ours", "flat", "packed"),
    "step:recurrent_60": ("ours", "flat"),
    "step:recurrent_90": ("ours", "flat"),
}
"""Those of a variant; of others `_MOST`. TRL's step joins where it is installed, but for `step:held`."""
_MOST = ("ours", "flat", "gather")
VARIANTS, DEFAULT, QUICK = tuple(WORKLOADS), ("step",), ("step",)
SECONDS = {"step": 18, "step:nothing_shared": 60, "step:held": 120, "step:many_short": 120}
SECONDS |= {"step:long_prefix": 150, "step:agent": 240, "step:recurrent_60": 150, "step:recurrent_90": 150}
SECONDS |= dict.fromkeys(dojo_rollouts.TASKS, 240 + dojo_rollouts.SECONDS)


ON_CPU = False


def workload_of(name: str, place: Place) -> Workload:
    if not place.real:
        return WORKLOADS[name]()
    model = real_qwen3(place)
    if name in REAL_WORKLOADS:
        return REAL_WORKLOADS[name](model)
    return replace(WORKLOADS[name](), model=model)


def chosen(name: str, place: Place) -> tuple[str, ...]:
    return CONTENDERS.get(name, _MOST) + (ON_CUDA if place.real else ())


def check(name: str, quick: bool, place: Place) -> Missing:
    """Every gradient of every contender equals the flat batch's (bench/agreement.py)."""
    return check_steps(workload_of(name, place), chosen(name, place))


def check_steps(workload: Workload, contenders: tuple[str, ...]) -> Missing:
    """Compare the gradients of these contenders with the flat batch's; those that are not to be timed."""
    weights = token_weights(workload)
    backwards = step_contenders(workload, weights)
    expected = expected_gradients(workload, backwards["flat"], lambda work: padded_loss(work, weights))
    missing = {one: why for one in contenders if (why := package_missing(one))}
    return missing | missing_of(
        [one for one in contenders if one not in missing],
        lambda one: expected.check(one, gradients(workload.model, backwards[one])),
        trusted=("flat",),
    )


def ideal(workload: Workload) -> float:
    return ideal_speedup(workload.forest, workload.model.config)


def run(name: str, quick: bool, place: Place, missing: Missing) -> Result:
    workload = workload_of(name, place)
    model, forest, weights = workload.model, workload.forest, token_weights(workload)
    backwards = step_contenders(workload, weights)
    contenders = with_steps(model, {one: backwards[one] for one in chosen(name, place) if one not in missing})
    figures = forest_backward(workload, Policy(model), weights).figures()
    with ExitStack() as stack:
        if "recurrent" not in name and name != "step:held" and not quick and not place.real:
            trl = trl_peer.grpo(workload, weights)
            expected = Expected(gradients(model, backwards["ours"]))
            missing |= trl_peer.join(contenders, stack, trl, expected)
        return compare(
            contenders,
            repeats=5,
            budget_s=10.0,
            ideal=ideal(workload),
            extra={
                "raw_tokens": forest.num_tokens,
                "unique_tokens": forest.num_nodes,
                "raw_over_unique": forest.num_tokens / forest.num_nodes,
                "shortest_tokens": min(len(s) for s in workload.sequences),
                "longest_tokens": max(len(s) for s in workload.sequences),
                "parameters": sum(p.numel() for p in model.parameters()),
                "gflop": model_gflop(workload, forest),
                **{key: value for key, value in figures.items() if key.startswith("tree/")},
            },
            peaks=("ours", "flat"),
            warm=False,
            not_run=missing,
            place=place,
        )
