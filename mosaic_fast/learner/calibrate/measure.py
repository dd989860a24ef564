"""From probes to coefficients: what is run, how it is timed, what fits best, and how sure that is.

The probes are few forests that together tell every kind of work from the others. They are timed in rounds, on
a machine whose speed may drift, and each round is read by its own pace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import MARKDOWN
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from mosaic_fast.learner.execution import CostModel, Execution
from mosaic_fast.learner.execution.cost import work_of
from mosaic_fast.learner.execution.schedule import Schedule
from mosaic_fast.policy import Policy
from mosaic_kernels import pack_forest
from mosaic_kernels.forest.ideal import ModelShape

FloatArray = NDArray[np.float64]
_SECOND_OF_SIX = 0.2  # as a quantile


@dataclass(frozen=True)
class Times:
    """The times of all probes, with the machine's drifting speed taken out."""

    seconds: FloatArray  # [P] of each probe, at the pace of the fastest round
    spread: FloatArray  # [P] of a probe's rounds beside that pace: half the middle half, relative
    pace: FloatArray  # [R] how much longer than the fastest round each one took; its smallest is 1


def measured(
    runs: Sequence[Callable[[], None]], rounds: int, device: torch.device, said: Callable[[int], None]
) -> FloatArray:  # [R, P]
    """Seconds of every run in every round, after a round that warms up. said: called before each round.

    A round runs each once, in an order of its own, so that no run always follows the same one. One CPU thread
    is timed by its own clock, which other processes on the machine do not move, only slow down.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times, random = np.zeros((rounds + 1, len(runs))), np.random.default_rng(0)
    for index in range(rounds + 1):
        said(index)
        for which in random.permutation(len(runs)):
            _synchronize(device)
            start = clock()
            runs[which]()
            _synchronize(device)
            times[index, which] = clock() - start
    return times[1:]


def steady(times: FloatArray) -> Times:
    """Tell the machine's pace from the probes: times[r, p] = pace[r] * seconds[p], and disturbances on top.

    A slow minute slows all probes of its rounds, so a round's pace is the median of its probes' times, each
    divided by what is typical of it; and what is typical is the second shortest of six rounds, each divided
    by its pace. A disturbance only ever makes a run longer: half of a round's probes and more than half of a
    probe's rounds may have one without any effect. times: [R, P].
    """
    pace = np.ones(len(times))
    for _ in range(20):
        typical = np.quantile(times / pace[:, None], _SECOND_OF_SIX, axis=0)
        pace = np.median(times / typical, axis=1)
    beside = times / pace[:, None]
    low, high = np.quantile(beside / np.median(beside, axis=0), [0.25, 0.75], axis=0)
    seconds = np.quantile(beside, _SECOND_OF_SIX, axis=0) * pace.min()
    return Times(seconds, (high - low) / 2, pace / pace.min())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Probe:
    """Rollouts of `shared` common tokens and `own` others, the last `trained` of which are trained."""

    model: str  # of CONFIGS
    shared: int
    rollouts: int
    own: int
    trained: int
    budget: int
    plan: str

    def __str__(self) -> str:
        return f"{self.rollouts} x ({self.shared} + {self.own}), {self.trained}"


def _config(
    hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, head_dim: int = 64
) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        max_position_embeddings=65_536,
        tie_word_embeddings=True,
    )


CONFIGS: Mapping[str, Qwen3Config] = {
    "usual": _config(256, 768, 4, 4, 2, 4096),
    "narrow": _config(128, 256, 4, 2, 1, 512),  # calls of layers with hardly any weights
    "wide": _config(512, 1536, 4, 8, 4, 4096),  # many weights a call
    "keys": _config(256, 256, 2, 16, 16, 512),  # many keys and values to copy a call
    "words": _config(256, 256, 1, 4, 2, 8192),  # little but an LM head
    "large": _config(2048, 6144, 4, 16, 8, 32_768, 128),  # the same five for a GPU, but for "narrow"
    "large wide": _config(4096, 12_288, 4, 32, 8, 32_768, 128),
    "large keys": _config(1024, 1024, 2, 32, 32, 512, 128),
    "large words": _config(2048, 512, 1, 16, 8, 131_072, 128),
}
PROBES = (
    Probe("narrow", 0, 8, 8, 7, 8, "flat"),
    Probe("narrow", 0, 8, 32, 31, 32, "flat"),
    Probe("wide", 0, 4, 8, 7, 8, "flat"),
    Probe("usual", 0, 16, 32, 31, 64, "flat"),
    Probe("usual", 0, 8, 128, 1, 1024, "tree"),
    Probe("usual", 0, 8, 128, 127, 1024, "tree"),
    Probe("wide", 0, 1, 256, 255, 256, "tree"),
    Probe("words", 0, 4, 128, 127, 512, "tree"),
    Probe("usual", 0, 1, 2048, 4, 2048, "tree"),
    Probe("usual", 512, 32, 16, 16, 1024, "tree"),
    Probe("usual", 512, 4, 96, 96, 704, "cut"),
    Probe("usual", 512, 4, 96, 96, 704, "kept"),
    Probe("keys", 512, 8, 4, 4, 544, "tree"),
    Probe("keys", 512, 8, 4, 4, 516, "kept"),
    Probe("keys", 768, 6, 16, 16, 784, "kept"),
)
PROBES_ON_GPU = (  # large enough for the work to outlast the launches, in all but the first two
    Probe("narrow", 0, 8, 8, 7, 8, "flat"),
    Probe("narrow", 0, 8, 32, 31, 32, "flat"),
    Probe("large wide", 0, 4, 64, 63, 64, "flat"),
    Probe("large", 0, 16, 512, 511, 1024, "flat"),
    Probe("large", 0, 8, 2048, 1, 16_384, "tree"),
    Probe("large", 0, 8, 2048, 2047, 16_384, "tree"),
    Probe("large wide", 0, 1, 4096, 4095, 4096, "tree"),
    Probe("large words", 0, 4, 2048, 2047, 8192, "tree"),
    Probe("large", 0, 1, 32_768, 64, 32_768, "tree"),
    Probe("large", 8192, 32, 256, 256, 16_384, "tree"),
    Probe("large", 8192, 4, 1536, 1536, 11_264, "cut"),
    Probe("large", 8192, 4, 1536, 1536, 11_264, "kept"),
    Probe("large keys", 16_384, 8, 64, 64, 16_896, "tree"),
    Probe("large keys", 16_384, 8, 64, 64, 16_448, "kept"),
    Probe("large keys", 32_768, 8, 256, 256, 33_024, "kept"),
)


def random_policy(config: Qwen3Config, device: torch.device, dtype: torch.dtype) -> Policy:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    module: torch.nn.Module = model
    module.to(device=device, dtype=dtype)
    return Policy(model)


def prepared(probe: Probe) -> tuple[Execution, Schedule, tuple[float, ...]]:
    """How a probe of random tokens is run, and its work [K], in the order of the coefficients."""
    config, random = CONFIGS[probe.model], np.random.default_rng(0)
    prompt = random.integers(0, config.vocab_size, probe.shared)
    length = probe.shared + probe.own
    sequences = [
        np.append(prompt, random.integers(0, config.vocab_size, probe.own)) for _ in range(probe.rollouts)
    ]
    forest = pack_forest(sequences, [np.arange(length) >= length - probe.trained] * probe.rollouts)
    shape = cast(ModelShape, config)
    execution = Execution(probe.budget, 1.0, shape, plan=probe.plan)
    schedule = execution.schedule(forest)
    return execution, schedule, astuple(work_of(schedule.parts, shape))


@dataclass(frozen=True)
class Fit:
    """Coefficients with what the probes say about them."""

    cost: CostModel
    fitted: FloatArray  # [P] prediction / measured - 1 by the coefficients
    forecast: FloatArray  # [P] the same by the coefficients of all other probes: nothing was fitted to it
    error: FloatArray  # [K] standard error of each coefficient relative to it; inf where it is 0


def fit(work: FloatArray, seconds: FloatArray) -> Fit:
    """Coefficients of 0 or more with the least squared relative error. work: [P, K], seconds: [P]."""
    relative = work / seconds[:, None]  # [P, K]; times the coefficients: prediction / measured
    found = _least_squares(relative)
    others = [_least_squares(np.delete(relative, probe, axis=0)) for probe in range(len(seconds))]
    fitted = relative @ found - 1
    free = max(1, len(seconds) - np.count_nonzero(found))
    error = np.sqrt((fitted**2).sum() / free) * sensitivity(relative * found)
    forecast = (relative * np.array(others)).sum(axis=1) - 1
    return Fit(CostModel(*found.tolist()), fitted, forecast, error)


def sensitivity(shares: FloatArray) -> FloatArray:  # [K]
    """How many percent each coefficient moves where independent noise moves every time by one percent.

    shares: [P, K], the part of each probe's time that a coefficient explains; inf where that is nothing. One
    coefficient that explains all of every time has 1 / sqrt(P); above 10 or so a coefficient is a guess.
    """
    used = shares.any(axis=0)
    found = np.full(shares.shape[1], np.inf)
    found[used] = np.sqrt(np.diag(np.linalg.pinv(shares[:, used].T @ shares[:, used])))
    return found


def _least_squares(relative: FloatArray) -> FloatArray:  # [K]
    """The coefficients, 0 or more, whose predictions relative @ coefficients are nearest to 1."""
    scale = np.maximum(relative.max(axis=0), np.finfo(np.float64).tiny)
    used = np.ones(relative.shape[1], np.bool_)
    while True:
        found = np.zeros(len(used))
        found[used], *_ = np.linalg.lstsq(relative[:, used] / scale[used], np.ones(len(relative)))
        if (found >= 0).all():
            return found / scale
        used[found.argmin()] = False


def as_array(cost: CostModel) -> FloatArray:  # [K]
    return np.array(astuple(cost))


NAMES = tuple(field.name for field in fields(CostModel))
FORECAST_OFF = 0.25  # of a probe, by the coefficients of the others: plans differ by more where it matters
ERROR = 0.35  # of a coefficient
SPREAD = 0.10  # of a probe's rounds beside the machine's pace


def probe_table(probes: Sequence[Probe], times: Times, fit: Fit) -> Table:
    """How far predictions are off: `fit` by the coefficients, `forecast` by ones fitted to the others."""
    table = Table(box=MARKDOWN)
    for head in ("model", "forest", "plan", "ms", "spread", "fit", "forecast"):
        table.add_column(head, justify="right")
    for index, probe in enumerate(probes):
        table.add_row(
            probe.model,
            str(probe),
            probe.plan,
            f"{times.seconds[index] * 1e3:.1f}",
            f"{times.spread[index]:.0%}",
            f"{fit.fitted[index]:+.0%}",
            f"{fit.forecast[index]:+.0%}",
        )
    return table


def coefficient_table(fit: Fit) -> Table:
    """A row a coefficient; the column +- is its standard error, from what the fit leaves unexplained."""
    table = Table(box=MARKDOWN)
    for head in ("work", "seconds a unit", "+-"):
        table.add_column(head, justify="right")
    for name, value, error in zip(NAMES, as_array(fit.cost), fit.error, strict=True):
        table.add_row(name, f"{value:.3g}", f"{error:.0%}" if np.isfinite(error) else "not found")
    return table


def doubts(probes: Sequence[Probe], times: Times, fit: Fit) -> list[str]:
    """Where the coefficients are not to be trusted, a sentence each; nothing where they are."""
    found = []
    for name, error in zip(NAMES, fit.error, strict=True):
        if not np.isfinite(error):
            found.append(f"{name}: 0 fits best, which is hardly true: this kind of work is taken to be free")
        elif error > ERROR:
            found.append(f"{name}: known to within {error:.0%} only (good: {ERROR:.0%})")
    for index, probe in enumerate(probes):
        what = f"{probe.model} model, {probe}, {probe.plan}"
        if abs(fit.forecast[index]) > FORECAST_OFF:
            found.append(f"{what}: forecast off by {fit.forecast[index]:+.0%} (good: {FORECAST_OFF:.0%})")
        if times.spread[index] > SPREAD:
            found.append(f"{what}: rounds differ by {times.spread[index]:.0%} (good: {SPREAD:.0%})")
    return found


def summary(fit: Fit) -> str:
    """One line on how well the fit forecasts, for `about` in the file of coefficients."""
    off = np.abs(fit.forecast)
    return f"forecasts of probes off by {np.median(off):.0%} (median), {off.max():.0%} (most)"
