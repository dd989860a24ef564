"""Benchmarks: python bench/run.py [case ...] [--device auto|cpu|cuda] [--quick] [--profile] [--json FILE]

A case has variants: `step` runs those that fit a run of minutes, `step:agent` one, `step:all` every one,
`scaling:sharing` those that begin so. Without names, every case but `trl` runs. Each variant's contenders are
checked for correctness before they are timed, in the same run. On a CUDA device cases have sizes of their
own; what the embedded model and numpy do runs on the CPU there, too.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before torch is imported
    from run_arguments import parse

    parse()

import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import flash_pref_peer
import torch
import trl_peer
from charts import draw_charts
from device import CPU, Place, place_of
from machine import Roofline, machine, measure_roofline
from measure import Result
from output import (
    Report,
    console_table,
    formulas_by_name,
    machine_line,
    not_run,
    write_json,
    write_markdown,
)
from peer import PeerError
from profiling import profile_step
from rich.console import Console
from run_arguments import ALL_CASES, CASES, Arguments, parse
from serving import sglang_installed

from mosaic_fast.errors import UserError
from mosaic_kernels.selfcheck import KernelMismatch


def main() -> int:
    arguments = parse()
    problem = _mistake(arguments)
    place = CPU
    try:
        place = place_of(arguments.device)
    except ValueError as error:
        problem = str(error)
    wanted: list[str] = []
    for name in arguments.cases:
        found = variants_of(name, arguments.quick)
        if not found and name in ALL_CASES:
            problem = f"{name} has nothing for --quick"
        elif not found:
            there = [variant for case in ALL_CASES for variant in load_case(case).VARIANTS]
            problem = f"no case {name}; there are {', '.join(there)}"
        wanted += [one for one in found if one not in wanted]
    if arguments.profile and arguments.cases == CASES:
        wanted = ["step"]
    if arguments.profile and any(one.partition(":")[0] != "step" for one in wanted):
        problem = "--profile is of variants of step; name one, such as step:agent"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if arguments.profile:
        folder = Path(arguments.json).parent if arguments.json else Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        try:
            for name in wanted:
                profile_step(name, folder, console)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    return _measure(wanted, arguments, place, console)


def _measure(wanted: list[str], arguments: Arguments, place: Place, console: Console) -> int:
    plain = {"highlight": False, "markup": False}  # names in brackets are no styles
    rooflines: dict[str, Roofline] = {}
    for one in (place_for(name, place) for name in wanted):
        if one.device.type not in rooflines:
            found = rooflines[one.device.type] = measure_roofline(arguments.threads, arguments.quick, one)
            one.release()
            console.print(str(found), **plain)
    if not arguments.quick and not place.real:
        expected = sum(seconds_of(name) for name in wanted)
        console.print(f"about {math.ceil(expected / 60)} minutes on two idle cores of an AMD EPYC", **plain)

    def report_of(results: Mapping[str, Result]) -> Report:
        installed = {
            "trl": trl_peer.installed(),
            "flash_pref": flash_pref_peer.installed(),
            "sglang": sglang_installed(),
        }
        missing = not_run(installed, quick=arguments.quick, results=results, cuda=place.real)
        return Report(results, {name: formula_of(name) for name in results}, rooflines, missing | left_out)

    def keep(results: Mapping[str, Result]) -> None:
        if arguments.json:
            write_json(report_of(results), Path(arguments.json))

    left_out: dict[str, str] = {}  # variants
    results, status = _run(wanted, arguments.quick, place, console, keep, left_out)
    if not results:
        return status or 1
    report = report_of(results)
    console.print(*console_table(report), sep="\n")
    for names, formula in formulas_by_name(report):
        console.print(f"{names}: {formula}", **plain)
    if arguments.json:
        file = Path(arguments.json)
        write_markdown(report, file.with_suffix(".md"))
        charts = draw_charts(results, machine_line(machine()), file.parent, file.stem)
        for path in [file, file.with_suffix(".md"), *charts]:
            console.print(f"wrote {path}", highlight=False)
    return status


def _run(
    wanted: list[str],
    quick: bool,
    place: Place,
    console: Console,
    keep: Callable[[Mapping[str, Result]], None],
    left_out: dict[str, str],
) -> tuple[dict[str, Result], int]:
    """Results by variant, and the exit status: 1 after a wrong one, which ends the run as Ctrl-C (130) does.

    What was measured until then is kept: `keep` is given all results after each case. Variants for which the
    device has no room, or that need what is not installed, are added to `left_out` with the reason.
    """
    plain = {"highlight": False, "markup": False}
    results: dict[str, Result] = {}
    name, began = "", time.perf_counter()
    try:
        for number, name in enumerate(wanted, start=1):
            case, start = load_case(name), time.perf_counter()
            number_of = f"[{number}/{len(wanted)}] {name}"
            console.print(f"{number_of}: checking", **plain)
            its_place = place_for(name, place)
            try:
                missing = case.check(name, quick, its_place)
                its_place.release()
                console.print(f"{number_of}: timing", **plain)
                results[name] = case.run(name, quick, its_place, missing)
            except torch.OutOfMemoryError:
                left_out[name] = f"{machine()['gpu']} has no room for it"
                console.print(f"{number_of}: {left_out[name]}", **plain)
            except UserError as error:
                left_out[name] = str(error)
                console.print(f"{number_of}: not run: {error}", **plain)
            its_place.release()
            keep(results)
            now = time.perf_counter()
            console.print(f"{number_of}: took {now - start:.0f} s, {now - began:.0f} s so far", **plain)
    except (AssertionError, KernelMismatch) as error:
        console.print(f"{name}: WRONG, not timed: {error}", style="red", highlight=False)
        return results, 1
    except PeerError as error:
        console.print(f"{name}: {error}", style="red", highlight=False)
        return results, 1
    except KeyboardInterrupt:
        console.print(f"stopped in {name}; {len(results)} of {len(wanted)} were measured", **plain)
        return results, 130
    return results, 0


def _mistake(arguments: Arguments) -> str | None:
    """What is wrong with an option, and what would be right."""
    cores = os.cpu_count() or 1
    if not 1 <= arguments.threads <= cores:
        return f"--threads {arguments.threads}: this machine has {cores} cores; name 1 to {cores}"
    if arguments.json:
        file = Path(arguments.json)
        if file.suffix != ".json":
            return f"--json {file}: name a file that ends in .json; a table and charts are put beside it"
        if not file.parent.is_dir():
            return f"--json {file}: there is no folder {file.parent}"
    return None


def load_case(name: str) -> ModuleType:
    return importlib.import_module(f"cases.{name.partition(':')[0]}")


def place_for(name: str, place: Place) -> Place:
    """Where a case runs: on the CPU what is numpy's or the embedded model's."""
    return CPU if load_case(name).ON_CPU else place


def formula_of(name: str) -> str:
    """The ideal of a variant in words."""
    found: str | dict[str, str] = load_case(name).FORMULA
    return found if isinstance(found, str) else found[name]


def seconds_of(name: str) -> int:
    """About how long a variant takes, checks and peers included, on one thread of an AMD EPYC."""
    return load_case(name).SECONDS.get(name, 10)


def variants_of(name: str, quick: bool) -> list[str]:
    """What a name on the command line means; [] if there is nothing of that name."""
    case_name, _, rest = name.partition(":")
    if case_name not in ALL_CASES:
        return []
    case = load_case(case_name)
    if name == case_name:
        return list(case.QUICK if quick else getattr(case, "DEFAULT", case.VARIANTS))
    if rest == "all":
        return list(case.VARIANTS)
    return [name] if name in case.VARIANTS else [one for one in case.VARIANTS if one.startswith(f"{name}-")]


if __name__ == "__main__":
    raise SystemExit(main())
