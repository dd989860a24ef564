"""Results as a table on the console, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from agreement import OTHERS
from machine import Roofline, commit, machine, rate, versions
from measure import Result
from pydantic import TypeAdapter
from rich.table import Table

HEADS = (
    "case",
    "ours",
    "spread",
    "flat",
    "speed-up",
    "ideal",
    "of ideal",
    "raw/unique",
    "MiB ours",
    "MiB flat",
)
HEADS += ("rate", "of roofline")


@dataclass(frozen=True)
class Report:
    """All that a run found."""

    results: Mapping[str, Result]  # by variant
    formulas: Mapping[str, str]  # of the ideal, by variant
    rooflines: Mapping[str, Roofline]  # by type of device
    not_run: Mapping[str, str]  # peer -> reason

    def roofline_of(self, result: Result) -> Roofline:
        return self.rooflines[result.device]

    @property
    def where(self) -> str:
        """Machine and precision in words."""
        precisions = {one.device: one.precision for one in self.rooflines.values()}
        if "cuda" not in precisions:
            return f"{machine_line(machine())}, {precisions['cpu']}"
        on_cpu = "forest, rollout and train on the CPU"
        return f"{machine_line(machine())}; {precisions['cuda']} on the GPU; {on_cpu}"


_OF_CUDA = ("flex", "flash", "liger", "cce")


def not_run(
    installed: Mapping[str, bool],  # trl, flash_pref, sglang
    *,
    quick: bool,
    results: Mapping[str, Result],
    cuda: bool = False,
) -> dict[str, str]:
    """Peers that no case of this run measures, with the reason."""
    found: dict[str, str] = {}
    for result in results.values():
        found |= {OTHERS.get(one, one): why for one, why in result.not_run.items()}
    for one in _OF_CUDA:
        found.setdefault(
            OTHERS[one], "no case of this run measures it" if cuda else "its kernels need a CUDA device"
        )
    if not cuda:
        found["FlexAttention"] = "its CPU version has no backward pass; on CUDA it is a backend of ours"
    for one in ("trl", "flash_pref"):
        if not installed[one]:
            found[OTHERS[one]] = "not installed: make bench-peers"
        elif quick:
            found[OTHERS[one]] = "left out by --quick"
    if cuda:
        found["TRL"] = "measured on CPUs: beside ours its copy of the model has no room on one GPU"
    if not installed["sglang"]:
        found["SGLang"] = "not installed: make sglang"
    measured = {OTHERS[one] for result in results.values() for one in result.contenders if one in OTHERS}
    return {name: why for name, why in found.items() if name not in measured}


def formulas_by_name(report: Report) -> list[tuple[str, str]]:
    """Each formula once, with the variants it belongs to."""
    names: dict[str, list[str]] = {}
    for name, formula in report.formulas.items():
        names.setdefault(formula, []).append(name)
    return [(", ".join(variants), formula) for formula, variants in names.items()]


def cells(name: str, result: Result, roofline: Roofline) -> list[str]:
    """A row of the table, in the order of HEADS; empty where a case has no such figure."""
    extra = result.extra
    sharing = extra["raw_tokens"] / extra["unique_tokens"]
    memory = [f"{1024 * extra[key]:.0f}" if key in extra else "" for key in ("peak_gib", "flat_peak_gib")]
    speed, share = "", ""
    no_flat = math.isnan(result.flat_median_s)
    if "gflop" in extra:
        per_second = extra["gflop"] / result.median_s
        speed, share = rate(per_second), f"{per_second / roofline.gemm_gflop_per_s:.0%}"
    elif "gbyte" in extra:
        per_second = extra["gbyte"] / result.median_s
        speed, share = f"{per_second:.1f} GB/s", f"{per_second / roofline.copy_gb_per_s:.0%}"
    return [
        name,
        f"{1e3 * result.median_s:.1f} ms",
        f"{result.spread:.0%}",
        "" if no_flat else f"{1e3 * result.flat_median_s:.1f} ms",
        "" if no_flat else f"{result.ratio_to_flat:.2f}x",
        "" if no_flat else f"{result.ideal:.2f}x",
        f"{result.share_of_ideal:.0%}",
        f"{sharing:.2f}x",
        *memory,
        speed,
        share,
    ]


def contender_rows(report: Report) -> Iterator[list[str]]:
    """case, contender, median, spread, how many times as fast ours is; of cases with more than two."""
    for name, result in report.results.items():
        for one, timing in result.contenders.items():
            if one not in ("ours", "flat"):
                ahead = timing.median_s / result.median_s
                yield [name, one, f"{1e3 * timing.median_s:.1f} ms", f"{timing.spread:.0%}", f"{ahead:.2f}x"]


_CONTENDER_HEADS = ("case", "contender", "median", "spread", "ours is faster by")


def console_table(report: Report) -> list[Table]:
    main = _table(report.where, HEADS)
    for name, result in report.results.items():
        main.add_row(*cells(name, result, report.roofline_of(result)))
    others = _table("others in the same rounds", _CONTENDER_HEADS)
    for row in contender_rows(report):
        others.add_row(*row)
    missing = _table("not run", ("peer", "reason"))
    for row in report.not_run.items():
        missing.add_row(*row)
    return [table for table in (main, others, missing) if table.row_count]


def _table(title: str, heads: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for head in heads:
        table.add_column(
            head,
            justify="left" if head in ("case", "contender", "peer", "reason") else "right",
            no_wrap=head != "reason",
        )
    return table


def machine_line(found: Mapping[str, object]) -> str:
    return f"{found['cpu']}, {found['threads']} of {found['cores']} cores" + (
        f", {found['gpu']}" if found["gpu"] else ""
    )


def write_json(report: Report, file: Path) -> None:
    content = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rooflines": {device: asdict(one) for device, one in report.rooflines.items()},
        "cases": {
            name: {**_plain(result), "formula": report.formulas[name]}
            for name, result in report.results.items()
        },
        "not_run": dict(report.not_run),
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_results(file: Path) -> tuple[dict[str, Result], str]:
    """The results of a file that `write_json` wrote, and the machine in words."""
    content = json.loads(file.read_text(encoding="utf-8"))
    cases = content["cases"]
    for case in cases.values():
        case["flat_median_s"] = math.nan if case["flat_median_s"] is None else case["flat_median_s"]
    return TypeAdapter(dict[str, Result]).validate_python(cases), machine_line(content["machine"])


def _plain(result: Result) -> dict[str, object]:
    """A dataclass's fields as JSON has them, which knows no NaN."""
    fields: dict[str, object] = dict(asdict(result))
    if math.isnan(result.flat_median_s):
        fields["flat_median_s"] = None
    return fields


def write_markdown(report: Report, file: Path) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    rows = [cells(name, one, report.roofline_of(one)) for name, one in report.results.items()]
    lines = [
        f"{report.where}; {packages}; commit {commit()}.",
        *(f"Measured at start: {one}." for one in report.rooflines.values()),
        "Medians of interleaved rounds. Spread is (slowest - fastest) / median.",
        "",
        *_markdown(HEADS, rows),
        "",
        *_markdown(_CONTENDER_HEADS, list(contender_rows(report))),
        "",
        *(f"- {names}: {formula}" for names, formula in formulas_by_name(report)),
        "",
        *(f"- not run: {name}, {reason}" for name, reason in report.not_run.items()),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _markdown(heads: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (list(heads), ["---"] * len(heads), *rows)]
