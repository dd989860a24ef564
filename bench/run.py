"""Benchmarks: python bench/run.py [case ...] [--quick] [--json FILE]

A case has variants; `step` runs all of its own, `step:agent` one.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import tyro
from measure import Result
from rich.console import Console
from rich.table import Table

CASES = ("forest", "step", "rollout")


@dataclass(frozen=True)
class _Arguments:
    """Measure this machine. Every case is checked for correctness before it is timed."""

    cases: Annotated[tuple[str, ...], tyro.conf.Positional] = CASES
    """Cases (forest, step, rollout) or variants of them (step:agent) to run."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Smaller sizes and fewer rounds."""
    threads: int = 1
    """CPU threads of PyTorch. More than there are idle cores make every figure worthless."""
    json: str | None = None
    """Write the results to this file."""


def main() -> int:
    arguments = tyro.cli(_Arguments, prog="python bench/run.py")
    wanted: list[str] = []
    for name in arguments.cases:
        found = _variants(name, arguments.quick)
        if not found:
            there = [variant for case in CASES for variant in _case(case).VARIANTS]
            print(f"error: no case {name}; there are {', '.join(there)}", file=sys.stderr)
            return 2
        wanted += found
    torch.set_num_threads(max(1, arguments.threads))
    console, results = Console(width=None if sys.stdout.isatty() else 120), {}
    for name in wanted:
        case = _case(name)
        console.print(f"{name}: checking", highlight=False)
        try:
            case.check(name, arguments.quick)
        except AssertionError as error:
            console.print(f"{name}: WRONG, not timed: {error}", style="red", highlight=False)
            return 1
        console.print(f"{name}: timing", highlight=False)
        results[name] = case.run(name, arguments.quick)
    console.print(_table(results))
    if arguments.json:
        found = {
            "machine": _machine(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers", "numpy", "mosaic-fast")},
            "commit": _commit(),
            "cases": {name: asdict(result) for name, result in results.items()},
        }
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _case(name: str) -> ModuleType:
    return importlib.import_module(f"cases.{name.partition(':')[0]}")


def _variants(name: str, quick: bool) -> list[str]:
    """What a name on the command line means: itself, or all variants of its case; [] if there is none."""
    if name.partition(":")[0] not in CASES:
        return []
    case = _case(name)
    if name in CASES:
        return list(case.QUICK if quick else case.VARIANTS)
    return [name] if name in case.VARIANTS else []


def _table(results: dict[str, Result]) -> Table:
    table = Table(title=f"{_machine()['cpu']}, {torch.get_num_threads()} threads, fp32")
    for head in (
        "case",
        "ours",
        "spread",
        "flat",
        "speed-up",
        "ideal",
        "of ideal",
        "raw/unique",
        "MiB, flat",
    ):
        table.add_column(head, justify="left" if head == "case" else "right")
    for name, r in results.items():
        sharing = r.extra["raw_tokens"] / r.extra["unique_tokens"]
        table.add_row(
            name,
            f"{1e3 * r.median_s:.1f} ms",
            f"{r.spread:.0%}",
            f"{1e3 * r.flat_median_s:.1f} ms",
            f"{r.ratio_to_flat:.2f}x",
            f"{r.ideal:.2f}x",
            f"{r.share_of_ideal:.0%}",
            f"{sharing:.2f}x",
            " / ".join(
                f"{1024 * r.extra[key]:.0f}" for key in ("peak_gib", "flat_peak_gib") if key in r.extra
            ),
        )
    return table


def _machine() -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _commit() -> str | None:
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


if __name__ == "__main__":
    raise SystemExit(main())
