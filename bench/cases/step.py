"""step: one whole training step (forward, backward, AdamW) on the forest against the padded flat batch.

    step                 rollouts of the embedded default, played by the embedded model (0.8 M parameters)
    step:long_prefix     1,500 shared tokens, 6 rollouts of 250, half of them forking halfway
    step:held            the same with 2,000 tokens a micro-batch; `cut` repeats the prefix instead
    step:many_short      300 shared tokens, 64 rollouts of 30
    step:agent           8 agent trajectories of about 2,100 tokens: 1,700 shared, turns with observations
                         between them, some forking at a turn; lengths as on AgentDojo, tokens random
    step:nothing_shared  5 rollouts of 500, nothing shared

All but the first: a Qwen3 model of 20 M parameters. Contenders: see bench/contenders.py; `trl` is the step of
TRL's GRPO trainer in .venv-peers. peak is the most memory PyTorch holds during forward and backward, beyond
weights and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import trl_peer
from contenders import (
    check_gradients,
    forest_backward,
    gradients,
    model_gflop,
    step_contenders,
    token_weights,
    with_steps,
)
from measure import Result, compare
from workloads import Workload, agent, drawn, played

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
}
CONTENDERS = {
    "step": ("ours", "flat"),
    "step:held": ("ours", "flat", "cut"),
    "step:nothing_shared": ("ours", "flat", "packed"),
}
"""Those of a variant; of others `_MOST`. TRL's step joins where it is installed, but for `step:held`."""
_MOST = ("ours", "flat", "gather")
VARIANTS, DEFAULT, QUICK = tuple(WORKLOADS), ("step",), ("step",)
SECONDS = {"step": 18, "step:nothing_shared": 60, "step:held": 120, "step:many_short": 120}
SECONDS |= {"step:long_prefix": 150, "step:agent": 240}


def chosen(name: str) -> tuple[str, ...]:
    return CONTENDERS.get(name, _MOST)


def check(name: str, quick: bool) -> None:
    """Every gradient of every contender equals the flat batch's, fp32, 1e-4 of each gradient's norm."""
    workload = WORKLOADS[name]()
    backwards = step_contenders(workload, token_weights(workload))
    check_gradients(workload.model, {one: backwards[one] for one in chosen(name)})


def ideal(workload: Workload) -> float:
    return ideal_speedup(workload.forest, workload.model.config)


def run(name: str, quick: bool) -> Result:
    workload = WORKLOADS[name]()
    model, forest, weights = workload.model, workload.forest, token_weights(workload)
    backwards = step_contenders(workload, weights)
    contenders = with_steps(model, {one: backwards[one] for one in chosen(name)})
    figures = forest_backward(workload, Policy(model), weights).figures()
    with ExitStack() as stack:
        not_run: dict[str, str] = {}
        if name != "step:held" and not quick:
            trl = trl_peer.grpo(workload, weights)
            not_run = trl_peer.join(contenders, stack, trl, gradients(model, backwards["ours"]))
        return compare(
            contenders,
            repeats=5,
            budget_s=10.0,
            ideal=ideal(workload),
            extra={
                "raw_tokens": forest.num_tokens,
                "unique_tokens": forest.num_nodes,
                "raw_over_unique": forest.num_tokens / forest.num_nodes,
                "parameters": sum(p.numel() for p in model.parameters()),
                "gflop": model_gflop(workload, forest),
                **{key: value for key, value in figures.items() if key.startswith("tree/")},
            },
            peaks=("ours", "flat"),
            warm=False,
            not_run=not_run,
        )
