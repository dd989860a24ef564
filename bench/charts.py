"""Charts of a results file: python bench/charts.py RESULTS.json FOLDER

    <stem>-sharing   speed-up over the padded flat batch against the share of tokens that are shared, with the
                     arithmetic ideal as a line; from the variants scaling:sharing-N (or short-N)
    <stem>-cases     speed-up of every variant, with its ideal; where there are others than those

Each as .svg and .png.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and len(sys.argv) != 3:  # answered before matplotlib is imported
    print(__doc__)
    raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from measure import Result
from output import load_results

_LABELS = {
    "trl": "TRL 1.16 GRPO step",
    "gather": "gathered K/V",
}


def draw_charts(results: Mapping[str, Result], about: str, folder: Path, stem: str) -> list[Path]:
    """Draw what there are variants for; returns the files written. about: the machine, in words."""
    written = []
    points = [(case.extra["sharing_frac"], case) for name, case in results.items() if ":sharing-" in name]
    points = points or [(c.extra["sharing_frac"], c) for name, c in results.items() if ":short-" in name]
    if len(points) > 1:
        figure = Figure(figsize=(8, 5), layout="constrained")
        _sharing(figure.add_subplot(), sorted(points, key=lambda point: point[0]), about)
        written += _save(figure, folder / f"{stem}-sharing")
    compared = {name: case for name, case in results.items() if not math.isnan(case.flat_median_s)}
    if len(compared) > max(1, len(points)):  # of points alone the first chart says it all
        figure = Figure(figsize=(8, 1 + 0.35 * len(compared)), layout="constrained")
        _cases(figure.add_subplot(), compared, about)
        written += _save(figure, folder / f"{stem}-cases")
    return written


def _sharing(axes: Axes, points: list[tuple[float, Result]], about: str) -> None:
    """Draw speed-up over raw / unique tokens, over which the ideal is nearly a straight line."""
    places = [1 / (1 - share) for share, _ in points]
    cases = [case for _, case in points]
    lines = {
        one: [
            (x, case.flat_median_s / case.contenders[one].median_s)
            for x, case in zip(places, cases, strict=True)
            if one in case.contenders
        ]
        for one in ("ours", *_LABELS)
    }
    ends: dict[str, tuple[float, str]] = {}  # a line's name -> its height at the right end, its color
    for number, (one, label) in enumerate(_LABELS.items(), start=1):
        if lines[one]:
            axes.plot(*zip(*lines[one], strict=True), "s-", color=f"C{number}", markersize=4, linewidth=1.2)
            ends[label] = (lines[one][-1][1], f"C{number}")
    axes.plot(places, [case.ideal for case in cases], "k--", linewidth=1.5)
    axes.plot(*zip(*lines["ours"], strict=True), "o-", color="C0", linewidth=3, markersize=7, zorder=3)
    axes.plot(places, [1.0] * len(places), color="grey", linewidth=1.5)
    ends |= {"arithmetic ideal": (cases[-1].ideal, "black"), "padded flat batch": (1.0, "grey")}
    _name_lines(axes, places[-1], {"mosaic_fast": (lines["ours"][-1][1], "C0"), **ends})
    for x, ratio in lines["ours"]:
        axes.annotate(
            f"{ratio:.3g}x", (x, ratio), xytext=(-5, 8), textcoords="offset points",
            color="C0", fontsize=10, fontweight="bold", ha="right",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(places[0] / 1.45, places[-1] * 2.7)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FixedFormatter([f"{100 * share:.0f}%" for share, _ in points]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("rollout tokens that are shared")
    axes.set_ylabel("times as fast as the padded flat batch")
    axes.set_title(f"A training step: the more the rollouts share, the faster\n{about}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _name_lines(axes: Axes, x: float, ends: Mapping[str, tuple[float, str]]) -> None:
    """Names at the right ends of the lines, moved up where they would lie on one another."""
    lowest = -math.inf
    for name, (height, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        lowest = max(math.log2(height), lowest + 0.3)
        axes.annotate(
            name, (x, 2**lowest), xytext=(12, 0), textcoords="offset points",
            color=color, fontsize=10, fontweight="bold" if color == "C0" else "normal", va="center",
        )  # fmt: skip


def _cases(axes: Axes, cases: Mapping[str, Result], about: str) -> None:
    """Draw a bar a variant, which begins at 1, the speed of the flat batch."""
    names = list(cases)[::-1]
    ratios, ideals = [cases[n].ratio_to_flat for n in names], [cases[n].ideal for n in names]
    axes.barh(names, [ratio - 1 for ratio in ratios], left=1.0, color="C0", height=0.6, label="ours")
    axes.plot(ideals, names, "k|", markersize=12, markeredgewidth=2, linestyle="none", label="ideal")
    for name, ratio, ideal in zip(names, ratios, ideals, strict=True):
        beside = max(ratio, 1.0)
        axes.annotate(
            f"{ratio:.2f}x", (max(beside, ideal) if ideal < 2 * beside else beside, name), xytext=(6, -3),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.5, *ratios), 2 * max(ratios + ideals))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("times as fast as flat (forest: as a Python trie; rollout: as transformers.generate)")
    axes.set_title(about, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1.0, -0.08), ncols=2, frameon=False)


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
