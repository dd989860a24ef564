"""Measure what forwards and backwards cost on this machine: `python -m mosaic_fast.calibrate [--out FILE]`.

A small random Qwen3 model runs forests of different shapes in different ways; the coefficients are those
that predict the times best, by least squares of the relative error, none below 0. Name the file as
`forest.cost_model` of a run. Training itself never measures anything to decide how a forest is run.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from mosaic_fast.cli import run_cli
from mosaic_fast.console import plain_console
from mosaic_fast.errors import UserError
from mosaic_fast.execution import CostModel, Execution, save_cost_model
from mosaic_fast.execution.cost import work_of
from mosaic_fast.policy import Policy
from mosaic_kernels import pack_forest

FloatArray = NDArray[np.float64]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Arguments:
    """Measure this machine for forest.cost_model. Takes well under a minute; leave the machine alone."""

    out: str = "cost.toml"
    """File to write."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    dtype: str = "float32"
    """float32 or bfloat16, as model.dtype."""
    threads: int = 1
    """CPU threads of PyTorch, as model.threads."""


@dataclass(frozen=True)
class Probe:
    """Rollouts of `shared` common tokens and `own` others, the last `trained` of which are trained."""

    shared: int
    rollouts: int
    own: int
    trained: int
    budget: int
    plan: str


PROBES = (
    Probe(0, 1, 32, 1, 64, "tree"),
    Probe(0, 1, 256, 255, 512, "tree"),
    Probe(0, 8, 128, 127, 1024, "tree"),
    Probe(0, 8, 128, 1, 1024, "tree"),
    Probe(0, 16, 32, 31, 64, "flat"),
    Probe(0, 1, 2048, 4, 2048, "tree"),
    Probe(0, 1, 2048, 2047, 2048, "tree"),
    Probe(1024, 32, 16, 16, 2048, "tree"),
    Probe(512, 8, 96, 96, 704, "cut"),
    Probe(512, 8, 96, 96, 704, "held"),
    Probe(1536, 12, 16, 8, 1568, "held"),
)


def main() -> int:
    arguments = tyro.cli(_Arguments, prog="python -m mosaic_fast.calibrate")
    device, dtype = _device(arguments.device), _DTYPES.get(arguments.dtype)
    if dtype is None:
        raise UserError(f"--dtype {arguments.dtype!r} is not one of {', '.join(_DTYPES)}")
    out = Path(arguments.out)
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out {out}: name a file in a folder that exists")
    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)
    console = plain_console()
    work, seconds = [], []
    policy = small_policy(device, dtype)
    for probe, units, took in measure(policy, rounds=4):
        console.print(f"{len(work) + 1}/{len(PROBES)}: {probe.plan}, {took * 1e3:.1f} ms", highlight=False)
        work.append(units)
        seconds.append(took)
    cost = fit(np.array(work), np.array(seconds))
    console.print(_table(cost, np.array(work), np.array(seconds)))
    about = f"{platform.processor() or platform.machine()}, {arguments.threads} threads"
    if device.type == "cuda":
        about = torch.cuda.get_device_name()
    about += f", {arguments.dtype}, PyTorch {torch.__version__}"
    try:
        save_cost_model(cost, out, about)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    console.print(f"wrote {out}; train with --forest.cost-model {out}", highlight=False)
    return 0


def small_policy(device: torch.device, dtype: torch.dtype) -> Policy:
    """3 M parameters in 4 layers, random."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    module: torch.nn.Module = model
    module.to(device=device, dtype=dtype)
    return Policy(model)


def measure(policy: Policy, rounds: int) -> Iterator[tuple[Probe, tuple[float, ...], float]]:
    """(probe, work, shortest seconds of a forward and backward pass) of every probe, after a first round.

    One CPU thread is timed by its own clock, which other processes on the machine do not move.
    """
    config, random = policy.model.config, np.random.default_rng(0)
    alone = policy.model.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    for probe in PROBES:
        prompt = random.integers(0, config.vocab_size, probe.shared)
        length = probe.shared + probe.own
        sequences = [
            np.append(prompt, random.integers(0, config.vocab_size, probe.own)) for _ in range(probe.rollouts)
        ]
        forest = pack_forest(sequences, [np.arange(length) >= length - probe.trained] * probe.rollouts)
        execution = Execution(probe.budget, 1.0, config, plan=probe.plan)
        schedule = execution.schedule(forest)
        times = []
        for _ in range(rounds + 1):
            _synchronize(policy)
            start = clock()
            execution.backward(policy, schedule, lambda piece: piece.logprobs.sum())
            _synchronize(policy)
            times.append(clock() - start)
            policy.model.zero_grad()
        yield probe, astuple(work_of(schedule.parts, config)), min(times[1:])


def fit(work: FloatArray, seconds: FloatArray) -> CostModel:
    """Coefficients of 0 or more with the least squared relative error. work: [P, K], seconds: [P]."""
    scaled = work / seconds[:, None]
    scale = scaled.max(axis=0)
    used = np.ones(work.shape[1], np.bool_)
    while True:
        found = np.zeros(work.shape[1])
        found[used], *_ = np.linalg.lstsq(scaled[:, used] / scale[used], np.ones(len(seconds)))
        if (found >= 0).all():
            return CostModel(*(found / scale).tolist())
        used[found.argmin()] = False


def _table(cost: CostModel, work: FloatArray, seconds: FloatArray) -> Table:
    table = Table(title="measured and predicted by the coefficients")
    for head in ("shared", "rollouts", "own", "plan", "measured", "predicted", "off by"):
        table.add_column(head, justify="right")
    predicted = work @ np.array(astuple(cost))
    for probe, took, said in zip(PROBES, seconds, predicted, strict=True):
        table.add_row(
            str(probe.shared),
            str(probe.rollouts),
            str(probe.own),
            probe.plan,
            f"{took * 1e3:.1f} ms",
            f"{said * 1e3:.1f} ms",
            f"{said / took - 1:+.0%}",
        )
    return table


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _synchronize(policy: Policy) -> None:
    if policy.model.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(run_cli(main))
