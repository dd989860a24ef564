"""Where a rollout forks: one trunk is sampled to its end, its siblings start from a prefix of it.

A fork costs no prefill, since the prefix is in the engine's radix cache, and it puts the difference between
two rollouts where the judge's preference is to act: at the check, or at a step the policy was unsure of.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from mosaic_rollout.types import Rollout

Branching = Literal["independent", "fork_at_check", "fork_at_step"]


def trunk_count(branching: Branching, group_size: int, gate_contrast: bool = False) -> int:
    """How many rollouts of a group are sampled from the prompt: all, one of two, or one of four."""
    if branching == "independent":
        return group_size
    return max(1, group_size // (4 if gate_contrast else 2))


def fork_position(trunk: Rollout, branching: Branching, seed: int) -> int | None:
    """Token index [0, L) from which a sibling differs; None where the trunk offers no such place.

    fork_at_check: right after the plan of one of its steps, drawn evenly.
    fork_at_step: before the first token of a step, drawn in proportion to the mean surprisal of its tokens.
    """
    if branching == "fork_at_check":
        starts = [(step.check_start, step.end) for step in trunk.steps]
        places = [start for start, end in starts if start is not None and start < end]
        weights = np.ones(len(places))
    else:
        places = [step.prompt_end for step in trunk.steps]
        surprisal = [-trunk.rollout_logprobs[step.prompt_end : step.end].mean() for step in trunk.steps]
        weights = np.asarray(surprisal, dtype=np.float64) + 1e-6
    if not places:
        return None
    random = np.random.default_rng([seed, trunk.rollout_id])
    return int(places[random.choice(len(places), p=weights / weights.sum())])
