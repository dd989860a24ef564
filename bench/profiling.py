"""Where one training step's time goes, operator by operator, and what Python takes beside them."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cases.step import WORKLOADS
from contenders import adamw, token_weights
from device import without_chatter
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from workloads import Workload

from mosaic_fast.learner.execution import Execution, MicroBatch
from mosaic_fast.policy import Policy

PHASES = ("pack", "plan", "passes", "optimizer")
TOP = 8


@dataclass
class Phase:
    """Seconds of one phase of the profiled step."""

    wall: float = 0.0
    operators: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # self time
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def outside(self) -> float:
        """Wall time outside all operators: Python, dispatch, autograd's bookkeeping, the profiler itself."""
        return self.wall - sum(self.operators.values())


def profile_step(name: str, folder: Path, console: Console) -> dict[str, Phase]:
    """Profile our step of a variant; print its phases and write a Chrome trace to the folder."""
    workload = WORKLOADS[name]()
    step = _Step(workload)
    step.run()
    start = time.perf_counter()
    step.run()
    unprofiled = time.perf_counter() - start
    with without_chatter(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        step.run()
    events = recorded.events()
    assert events is not None
    phases = split_phases(list(events))
    console.print(_table(name, phases, unprofiled))
    trace = folder / f"{name.replace(':', '-')}-trace.json"
    recorded.export_chrome_trace(str(trace))
    console.print(f"wrote {trace} (chrome://tracing, ui.perfetto.dev)", highlight=False)
    return phases


class _Step:
    """The step of `step`, its phases marked for the profiler."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self._policy = workload, Policy(workload.model)
        self._weights, self._optimizer = token_weights(workload), adamw(workload.model)

    def run(self) -> None:
        workload, weights = self._workload, self._weights
        self._optimizer.zero_grad()
        execution = Execution(workload.tokens_per_microbatch, 1.0, workload.model.config)
        with record_function("phase:pack"):
            forest = workload.forest
        with record_function("phase:plan"):
            schedule = execution.schedule(forest)

        def loss_of(micro_batch: MicroBatch) -> torch.Tensor:
            return (micro_batch.logprobs * weights[micro_batch.source]).sum() / len(weights)

        with record_function("phase:passes"):
            execution.backward(self._policy, schedule, loss_of)
        with record_function("phase:optimizer"):
            self._optimizer.step()


def split_phases(events: list[FunctionEvent]) -> dict[str, Phase]:
    """Operators by the phase in whose time they ran. Backward operators are marked as such."""
    spans = {e.name.removeprefix("phase:"): e for e in events if e.name.startswith("phase:")}
    phases = {name: Phase() for name in PHASES}
    backward = [e.time_range for e in events if e.name.startswith("autograd::engine::evaluate_function")]
    first_backward = min((span.start for span in backward), default=float("inf"))
    result: dict[str, Phase] = {}
    for name, phase in phases.items():
        span = spans[name].time_range
        if name != "passes":
            phase.wall = 1e-6 * (span.end - span.start)
            result[name] = phase
            continue
        result["forward"] = Phase(1e-6 * (min(first_backward, span.end) - span.start))
        result["backward"] = Phase(1e-6 * max(0.0, span.end - first_backward))
    for event in events:
        if event.name.startswith("phase:"):
            continue
        for name, span in ((n, s.time_range) for n, s in spans.items()):
            if span.start <= event.time_range.start < span.end:
                part = name
                if name == "passes":
                    part = "forward" if event.time_range.start < first_backward else "backward"
                # The engine's own marker is bookkeeping, not an operator.
                if not event.name.startswith(("autograd::", "torch::autograd")):
                    result[part].operators[event.name] += 1e-6 * event.self_cpu_time_total
                    result[part].calls[event.name] += 1
                break
    return result


def _table(name: str, phases: dict[str, Phase], unprofiled: float) -> Table:
    total = sum(phase.wall for phase in phases.values())
    table = Table(
        title=f"{name}: {1e3 * unprofiled:.0f} ms, profiled {1e3 * total:.0f} ms; "
        f"{torch.get_num_threads()} threads"
    )
    for head in ("phase", "operator", "calls", "self ms", "of the step"):
        table.add_column(head, justify="left" if head in ("phase", "operator") else "right")
    for phase_name, phase in phases.items():
        table.add_row(
            phase_name, "all", "", f"{1e3 * phase.wall:.1f}", f"{phase.wall / total:.1%}", style="bold"
        )
        ordered = sorted(phase.operators.items(), key=lambda item: -item[1])
        for operator, seconds in ordered[:TOP]:
            if seconds > 0.001 * total:
                calls = str(phase.calls[operator])
                table.add_row("", operator, calls, f"{1e3 * seconds:.1f}", f"{seconds / total:.1%}")
        rest = sum(seconds for _, seconds in ordered[TOP:])
        if rest > 0.001 * total:
            table.add_row("", f"{len(ordered) - TOP} others", "", f"{1e3 * rest:.1f}", f"{rest / total:.1%}")
        outside = "Python and dispatch"
        table.add_row("", outside, "", f"{1e3 * phase.outside:.1f}", f"{phase.outside / total:.1%}")
    return table
