"""The command line of bench/run.py. No torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from mosaic_fast.cli import options
from mosaic_fast.config.nearest import nearest
from mosaic_fast.errors import UserError

CASES = ("forest", "attention", "logprob", "preference", "step", "rollout", "train", "scaling")
ALL_CASES = (*CASES, "trl")  # with those that run by name only


@dataclass(frozen=True)
class Arguments:
    """Measure this machine. Every case is checked for correctness before it is timed."""

    cases: Annotated[tuple[str, ...], tyro.conf.Positional] = CASES
    """Cases (forest, attention, logprob, preference, step, rollout, train, scaling; trl by name only), or
    variants of them (step:agent, scaling:sharing, step:all)."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Smaller sizes and fewer rounds, without peers."""
    device: str = "auto"
    """auto, cpu or cuda. auto: a CUDA device where there is one."""
    threads: int = 1
    """CPU threads of PyTorch. More than there are idle cores make every figure worthless."""
    json: str | None = None
    """Write the results to this file, a Markdown table and charts beside it."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Instead of timing: where one training step's time goes on the CPU, of the named variants of step (by
    default step). A Chrome trace goes to bench/results, or beside --json."""


def parse() -> Arguments:
    """The process's command line. Exits with 2 where an option or case is not there; says what is meant."""
    try:
        arguments = options(Arguments, "python bench/run.py")
        for name in arguments.cases:
            case = name.partition(":")[0]
            if case not in ALL_CASES and (close := nearest(case, ALL_CASES)):
                raise UserError(f"no case {name}; did you mean {close}? There are {', '.join(ALL_CASES)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return arguments
