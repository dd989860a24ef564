"""trl: a step of TRL's trainers with shared prefixes (mosaic_fast.integrations.trl) beside TRL alone.

    trl:grpo            8 rollouts of 125 to 250 tokens behind 1,500 shared ones: a group
    trl:dpo             a pair of 150 to 300 tokens behind 1,000
    trl:sft             8 conversations of 200 to 400 tokens behind 600 of system prompt and tools
    trl:nothing_shared  SFT on 5 rows of 500, nothing shared

The trainer's own loss of a micro-batch, backward and AdamW, a Qwen3 model of 20 M parameters, fp32. `ours`
and `flat`, TRL alone, are a process each in .venv-trl, on the CPU. GRPO's loss is that of the first epoch,
DPO's reference is given. peak is the most memory PyTorch holds during forward and backward, beyond weights
and gradients.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

import numpy as np
import trl_peer
from agreement import Expected, Missing
from contenders import token_weights
from device import Place
from measure import Result, compare
from peer import Peer
from workloads import Workload, qwen3

from cases.step import FORMULA as FORMULA
from cases.step import ideal
from mosaic_fast.errors import UserError

SHAPES = {  # shared tokens, rows, fewest and most own tokens
    "trl:grpo": (1_500, 8, 125, 250),
    "trl:dpo": (1_000, 2, 150, 300),
    "trl:sft": (600, 8, 200, 400),
    "trl:nothing_shared": (0, 5, 500, 500),
}
VARIANTS = DEFAULT = tuple(SHAPES)
QUICK = ()  # there is nothing but a peer to measure
SECONDS = {"trl:grpo": 420, "trl:dpo": 60, "trl:sft": 150, "trl:nothing_shared": 60}
ON_CPU = True
BETA = 0.1


@cache
def workload_of(name: str) -> Workload:
    shared, rows, fewest, most = SHAPES[name]
    model, random = qwen3(), np.random.default_rng(0)
    prompt = random.integers(0, model.config.vocab_size, shared)
    own = random.integers(fewest, most + 1, rows)
    sequences = [np.append(prompt, random.integers(0, model.config.vocab_size, count)) for count in own]
    return Workload(model, sequences, [np.arange(len(s)) >= max(1, shared) for s in sequences])


def loaded(name: str, stack: ExitStack, *, shared: bool) -> Peer:
    """A peer with the batch of a variant, which stays until the stack is left."""
    workload = workload_of(name)
    if name == "trl:grpo":
        return stack.enter_context(trl_peer.grpo(workload, token_weights(workload), shared=shared))
    if name == "trl:dpo":
        reference = np.full(len(workload.sequences), -2_000.0)
        return stack.enter_context(trl_peer.dpo(workload, np.array([[0, 1]]), reference, BETA, shared=shared))
    return stack.enter_context(trl_peer.sft(workload, shared=shared))


def check(name: str, quick: bool, place: Place) -> Missing:
    """Every gradient of TRL's loss with shared prefixes is that of TRL alone."""
    if not trl_peer.installed():
        raise UserError("TRL is not installed: make bench-peers")
    with ExitStack() as stack:
        flat, ours = (loaded(name, stack, shared=shared) for shared in (False, True))
        Expected(flat.gradients()).check("ours", ours.gradients())
    return {}


def run(name: str, quick: bool, place: Place, missing: Missing) -> Result:
    workload = workload_of(name)
    forest = workload.forest
    with ExitStack() as stack:
        flat, ours = (loaded(name, stack, shared=shared) for shared in (False, True))
        return compare(
            {"ours": ours.step, "flat": flat.step},
            repeats=5,
            budget_s=60.0,
            ideal=ideal(workload),
            extra={
                "raw_tokens": forest.num_tokens,
                "unique_tokens": forest.num_nodes,
                "raw_over_unique": forest.num_tokens / forest.num_nodes,
                "peak_gib": ours.peak_gib(),
                "flat_peak_gib": flat.peak_gib(),
            },
            warm=False,
        )
