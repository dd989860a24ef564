"""Measure what forwards and backwards cost here: `python -m mosaic_fast.learner.calibrate [--out FILE]`.

Name the file as `forest.cost_model` of a run.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before torch is imported
    from mosaic_fast.cli import answer_at_once
    from mosaic_fast.learner.calibrate.arguments import parse

    answer_at_once(parse)

import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mosaic_fast.cli import plain_console, run_cli
from mosaic_fast.errors import UserError
from mosaic_fast.learner.calibrate.arguments import parse
from mosaic_fast.learner.calibrate.measure import (
    CONFIGS,
    PROBES,
    PROBES_ON_GPU,
    FloatArray,
    Probe,
    coefficient_table,
    doubts,
    fit,
    measured,
    prepared,
    probe_table,
    random_policy,
    steady,
    summary,
)
from mosaic_fast.learner.execution import save_cost_model

ROUNDS = 6
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(probes: Sequence[Probe] | None = None) -> int:
    """Measure these probes; None: those for the device."""
    arguments = parse()
    device, dtype = _device(arguments.device), _DTYPES.get(arguments.dtype)
    if dtype is None:
        raise UserError(f"--dtype {arguments.dtype!r} is not one of {', '.join(_DTYPES)}")
    out = Path(arguments.out)
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: name a file in a folder that exists")
    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)
    console = plain_console()
    if probes is None:
        probes = PROBES_ON_GPU if device.type == "cuda" else PROBES
    runs, work = _runs(probes, device, dtype)
    times = steady(
        measured(runs, ROUNDS, device, lambda one: console.print(f"round {one} of {ROUNDS}", highlight=False))
    )
    found = fit(work, times.seconds)
    console.print("", probe_table(probes, times, found), "", coefficient_table(found), sep="\n")
    console.print(
        "forest: rollouts x (shared + own tokens), how many of each are trained\n"
        "spread: of the rounds. fit: how far the prediction is off\n"
        "forecast: the same, by coefficients fitted to all other probes\n"
        "+-: standard error of a coefficient\n"
    )
    console.print(
        f"the machine's pace: rounds took up to {times.pace.max():.2f} times as long as the fastest",
        highlight=False,
    )
    about = f"{_machine(device)}, {arguments.dtype}, PyTorch {torch.__version__}; {summary(found)}"
    try:
        save_cost_model(found.cost, out, about)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    doubtful = doubts(probes, times, found)
    for one in doubtful:
        console.print(f"POOR: {one}", highlight=False, soft_wrap=True)
    if doubtful:
        console.print("the predictions may choose a slower plan: measure again when the machine is idle")
    console.print(f"wrote {out}; train with --forest.cost-model {out}", highlight=False)
    return 0


def _runs(
    probes: Sequence[Probe], device: torch.device, dtype: torch.dtype
) -> tuple[list[Callable[[], None]], FloatArray]:  # P, [P, K]
    """For each probe a function that runs its forward and backward pass once, and the work of that."""
    policies = {name: random_policy(CONFIGS[name], device, dtype) for name in {one.model for one in probes}}
    runs, work = [], []
    for probe in probes:
        policy = policies[probe.model]
        execution, schedule, units = prepared(probe)

        def run(policy=policy, execution=execution, schedule=schedule) -> None:
            # Gradients that are there are added to, as in all forwards of a step but the first.
            execution.backward(policy, schedule, lambda micro_batch: micro_batch.logprobs.sum())

        runs.append(run)
        work.append(units)
    return runs, np.array(work)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    kind = f"{platform.processor() or platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, {threads} thread{'s' if threads > 1 else ''}"


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


if __name__ == "__main__":
    sys.exit(run_cli(main))
