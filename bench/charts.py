"""Charts of a results file: python bench/charts.py RESULTS.json FOLDER

    <stem>-sharing   speed-up over the padded flat batch against the share of tokens that are shared, with the
                     arithmetic ideal as a line; from the variants scaling:sharing-N
    <stem>-cases     speed-up of every variant, with its ideal

Each as .svg and .png.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measure import Result
from output import load_results

_LABELS = {
    "trl": "TRL 1.16 GRPO step",
    "gather": "gathered K/V",
    "packed": "packed, stock model",
    "alone": "packed, ours without sharing",
}


def draw_charts(results: Mapping[str, Result], about: str, folder: Path, stem: str) -> list[Path]:
    """Draw what there are variants for; returns the files written. about: the machine, in words."""
    written = []
    points = [(case.extra["sharing_frac"], case) for name, case in results.items() if ":sharing-" in name]
    if len(points) > 1:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        _sharing(figure.add_subplot(), sorted(points, key=lambda point: point[0]), about)
        written += _save(figure, folder / f"{stem}-sharing")
    compared = {name: case for name, case in results.items() if not math.isnan(case.flat_median_s)}
    if len(compared) > 1:
        figure = Figure(figsize=(8, 1 + 0.35 * len(compared)), layout="constrained")
        _cases(figure.add_subplot(), compared, about)
        written += _save(figure, folder / f"{stem}-cases")
    return written


def _sharing(axes: Axes, points: list[tuple[float, Result]], about: str) -> None:
    share = [100 * one for one, _ in points]
    cases = [case for _, case in points]
    axes.plot(share, [case.ideal for case in cases], "k--", linewidth=1, label="arithmetic ideal")
    axes.plot(
        share, [case.ratio_to_flat for case in cases], "o-", color="C0", linewidth=2, label="mosaic_fast"
    )
    for color, (name, label) in enumerate(_LABELS.items(), start=1):
        found = [
            (x, case.flat_median_s / case.contenders[name].median_s)
            for x, case in zip(share, cases, strict=True)
            if name in case.contenders
        ]
        if found:
            axes.plot(
                *zip(*found, strict=True), "s-", color=f"C{color}", markersize=4, linewidth=1, label=label
            )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.annotate(
        "padded flat batch",
        (share[0], 1.0),
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=8,
        color="grey",
    )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("rollout tokens that are shared, %")
    axes.set_ylabel("speed-up of a training step")
    axes.set_title(f"A training step against sharing\n{about}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _cases(axes: Axes, cases: Mapping[str, Result], about: str) -> None:
    names = list(cases)[::-1]
    ratios, ideals = [cases[n].ratio_to_flat for n in names], [cases[n].ideal for n in names]
    axes.barh(names, ratios, color="C0", height=0.6, label="ours against flat")
    axes.plot(ideals, names, "k|", markersize=12, markeredgewidth=2, linestyle="none", label="ideal")
    for name, ratio in zip(names, ratios, strict=True):
        axes.annotate(f"{ratio:.2f}x", (ratio, name), xytext=(4, -3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.5, 2 * max(ratios + ideals))
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("speed-up")
    axes.set_title(about, fontsize=10)
    axes.legend(fontsize=8, loc="lower right")


def _save(figure: Figure, path: Path) -> list[Path]:
    FigureCanvasAgg(figure)
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def main() -> int:
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_file() or not Path(sys.argv[2]).is_dir():
        print("usage: python bench/charts.py RESULTS.json FOLDER, both of which exist", file=sys.stderr)
        return 2
    file = Path(sys.argv[1])
    results, about = load_results(file)
    for path in draw_charts(results, about, Path(sys.argv[2]), file.stem):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
