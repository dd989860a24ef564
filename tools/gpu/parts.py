"""What `make gpu` finds out, a part a process: python -m tools.gpu.parts NAME FILE [--small]

A part writes its figures to FILE as soon as it has them. It ends with 1 where something is wrong, and with 3
where it cannot run here; its last line then says why.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from device import CPU, Place, place_of

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "pydantic", "tyro", "rich", "tomli-w")
PACKAGES += ("hypothesis", "pytest", "liger-kernel", "flash-attn", "cut-cross-entropy", "trl", "sglang")
TOP = 12  # kernels of a profile


class Notes:
    """What a part has found so far, on disk after each addition."""

    def __init__(self, file: Path) -> None:
        self._file, self.found = file, dict[str, object]()

    def add(self, **figures: object) -> None:
        self.found |= figures
        self._file.write_text(json.dumps(self.found, default=str), encoding="utf-8")


def machine(notes: Notes, place: Place, small: bool) -> None:
    """What this is, what is installed, and the best it does with PyTorch's own operators."""
    from machine import measure_roofline

    versions = {name: _version(name) for name in PACKAGES}
    notes.add(
        python=platform.python_version(),
        versions={name: found for name, found in versions.items() if found},
        not_installed=", ".join(name for name, found in versions.items() if not found),
    )
    if place.device.type == "cuda":
        properties = torch.cuda.get_device_properties(place.device)
        notes.add(
            gpu=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            memory_gib=properties.total_memory / 2**30,
            cuda=torch.version.cuda,
            nccl=".".join(map(str, torch.cuda.nccl.version())),  # pyrefly: ignore
        )
    roofline = measure_roofline(1, small, place)
    notes.add(gemm_tflop_per_s=roofline.gemm_gflop_per_s / 1e3, copy_gb_per_s=roofline.copy_gb_per_s)


def checks(notes: Notes, place: Place, small: bool) -> None:
    """The self-check of each op, as its first call runs it: the worst share of what is allowed."""
    from mosaic_kernels.attention import triton as attention
    from mosaic_kernels.logprob import triton as logprob
    from mosaic_kernels.preference import triton as preference
    from mosaic_kernels.surrogate import triton as surrogate

    bf16, fp32 = torch.bfloat16, torch.float32
    cases: list[tuple[str, Any, Any]] = [
        ("clipped_surrogate", surrogate, (fp32, True)),
        ("pairwise_preference_loss", preference, (fp32, fp32)),
    ]
    for head_dim, group in ((128, 2), (128, 4), (64, 7), (96, 1), (256, 2)):
        one = attention.Variant(bf16, "ieee", head_dim, group, limit=head_dim == 96, value_dim=head_dim)
        cases.append((f"tree_attention D{head_dim} group {group}", attention, one))
    for dim in (2048, 4096):
        for few in (False, True):
            one = logprob.Variant(bf16, "ieee", dim, few_rows=few, entropy=not few, bias=False, softcap=False)
            cases.append((f"linear_logprob {dim}{' few rows' if few else ''}", logprob, one))
    wrong = []
    for name, module, variant in cases[:2] if small else cases:
        start = time.perf_counter()
        try:
            found = module.deviations(place.device, variant)
            share = max(one.error / one.limit for one in found.values())
            said = f"{share:.2f} of what is allowed, {time.perf_counter() - start:.1f} s"
            wrong += [] if share <= 1 else [f"{name}: {found}"]
        except Exception as error:  # noqa: BLE001  another kernel may be well
            said = f"{type(error).__name__}: {error}"[:300]
            wrong.append(f"{name}: {said}")
        notes.add(**{name: said})
    if wrong:
        raise SystemExit("; ".join(wrong)[:2000])


def verify(notes: Notes, place: Place, small: bool) -> None:
    """`python -m mosaic_kernels.verify --layer device`: every op against the fp64 oracle."""
    from mosaic_kernels import proof

    sizes = proof.Sizes(longest=4, vocab=20, heads=((2, 1, 16),)) if small else proof.ON_DEVICE
    dtypes = (torch.float32,) if small else (torch.float32, *proof.HALVES)
    for forests in (1,) if small else (1, 4):
        if not proof.check_device(forests, str(place.device), dtypes, sizes):
            raise SystemExit(f"an op is off its limits on {forests} forests: see the table above")
        notes.add(forests=forests, limits="kept")


def step(notes: Notes, place: Place, small: bool) -> None:
    """Training steps on a forest of agents' trajectories, by the learner's own execution and optimiser."""
    from workloads import QWEN3_1_7B, Shape, agent_rollouts, drawn_rollouts, real_qwen3

    from mosaic_fast.learner.execution import Execution, MicroBatch
    from mosaic_fast.learner.execution.cost import work_of
    from mosaic_fast.learner.execution.execution import stopwatch
    from mosaic_fast.learner.optimizer import Optimizer
    from mosaic_fast.policy import Policy
    from mosaic_kernels import ideal_speedup, pack_forest

    tiny = Shape(64, 128, layers=2, heads=4, key_heads=2, head_size=16, vocabulary=128)
    model = real_qwen3(place, tiny if small else QWEN3_1_7B)
    groups = (
        [drawn_rollouts(128, 40, 4, 20)] if small else [agent_rollouts(151_936, seed=g) for g in range(4)]
    )
    forest = pack_forest([s for g, _ in groups for s in g], [m for _, g in groups for m in g])
    notes.add(
        tokens=forest.num_tokens, unique_tokens=forest.num_nodes, ideal=ideal_speedup(forest, model.config)
    )
    settings: Any = SimpleNamespace(
        master_weights=True, weight_decay=0.0, lr=1e-6, beta1=0.9, beta2=0.95, grad_clip=1.0
    )
    policy, optimizer = Policy(model), Optimizer(model, settings)
    weights = place.randn(forest.num_tokens, seed=1).float()
    forwards: list[Callable[[], float]] = []
    run = policy.run

    def timed(*arguments: Any, **options: Any) -> Any:
        stop = stopwatch(place.device)
        result = run(*arguments, **options)
        forwards.append(stop())
        return result

    vars(policy)["run"] = timed

    def loss_of(micro_batch: MicroBatch) -> torch.Tensor:
        return (micro_batch.logprobs * weights[micro_batch.source]).sum() / len(weights)

    def one_step() -> dict[str, float]:
        forwards.clear()
        start = time.perf_counter()
        execution = Execution(8192, 1.0, model.config)
        schedule = execution.schedule(forest)
        planned = time.perf_counter()
        execution.backward(policy, schedule, loss_of)
        stop = stopwatch(place.device)
        norm = optimizer.step(1e-6, 1)
        update, passes = stop()(), execution.figures()["time/tree_pass_s"]
        forward = sum(read() for read in forwards)
        work = work_of(schedule.parts, model.config)
        return {
            "step_ms": 1e3 * (time.perf_counter() - start),
            "plan_ms": 1e3 * (planned - start),
            "forward_ms": 1e3 * forward,
            "backward_ms": 1e3 * (passes - forward),
            "optimizer_ms": 1e3 * update,
            "micro_batches": float(len(schedule.parts)),
            "tflop_per_s": 6e-12 * (work.linear + work.attention + work.head) / passes,
            "grad_norm": norm,
        }

    start = time.perf_counter()
    one_step()
    notes.add(first_step_s=time.perf_counter() - start)
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = [one_step() for _ in range(2 if small else 4)]
    notes.add(**{name: statistics.median(one[name] for one in found) for name in found[0]})
    if place.device.type == "cuda":
        notes.add(peak_gib=torch.cuda.max_memory_allocated() / 2**30)
        with counted_synchronisations() as count:
            one_step()
        notes.add(synchronisations=len(count))
    notes.add(profile=_profile(one_step, place))


@contextmanager
def counted_synchronisations() -> Iterator[list[str]]:
    """The places that wait for the GPU while entered, as PyTorch warns of them."""
    count: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield count
        finally:
            torch.cuda.set_sync_debug_mode(before)
            count += [str(one.message) for one in caught if "synchroniz" in str(one.message)]


def _profile(work: Callable[[], object], place: Place) -> dict[str, str]:
    """Milliseconds and calls of the kernels (on a CPU: operators) that take the most time."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = place.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        work()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    ordered = sorted(recorded.key_averages(), key=lambda one: -getattr(one, key))[:TOP]
    return {one.key[:60]: f"{getattr(one, key) / 1e3:.2f} ms in {one.count} calls" for one in ordered}


def case(*names: str, quick: str = "") -> Callable[[Notes, Place, bool], None]:
    """Variants of a case of the benchmark: checked, then timed beside what is installed."""

    def run(notes: Notes, place: Place, small: bool) -> None:
        for name in (quick or names[0],) if small else names:
            module = import_module(f"cases.{name.partition(':')[0]}")
            missing = module.check(name, small, place)
            place.release()
            notes.add(**{name: {"checked": "right"}})
            found = module.run(name, small, place, missing)
            place.release()
            figures = asdict(replace(found, not_run={**found.not_run, **missing}))
            notes.add(**{name: {key: value for key, value in figures.items() if value not in ({}, "")}})

    return run


def tests(notes: Notes, place: Place, small: bool) -> None:
    """The kernels' tests on the device; as many as there is time for."""
    folder = ROOT / "tests" / "kernels" / "triton"
    wanted = [folder / "test_clipped_surrogate.py"] if small else [folder]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--ignore-glob=*test_work*", *map(str, wanted)]
    command += ["-k", "half"] if small else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-1500:])
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    notes.add(pytest=lines[-1] if lines else done.stderr[-200:])
    if done.returncode not in (0, 5):  # 5: none was collected
        raise SystemExit(f"pytest ended with {done.returncode}")


PARTS: dict[str, Callable[[Notes, Place, bool], None]] = {
    "machine": machine,
    "checks": checks,
    "verify": verify,
    "step": step,
    "attention": case("attention", "attention:many_short", quick="attention:many_short"),
    "logprob": case("logprob"),
    "preference": case("preference"),
    "step:agent": case("step:agent", quick="step"),
    "tests": tests,
}


def _version(package: str) -> str:
    """The version of a package; "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        found = importlib.util.find_spec(package.replace("-", "_"))
        return str(getattr(import_module(package.replace("-", "_")), "__version__", "?")) if found else ""


def main() -> int:
    name, file, *more = sys.argv[1:]
    small = bool(more)
    np.random.seed(0)
    if not small and not torch.cuda.is_available():
        print("PyTorch finds no CUDA device")
        return 3
    torch.set_num_threads(1)
    try:
        PARTS[name](Notes(Path(file)), CPU if small else place_of("cuda"), small)
    except ModuleNotFoundError as error:
        print(f"needs {error.name}")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
