"""Is a policy harder to attack where a bandit picked the attacks it was trained on? In the embedded world.

    python bench/attackers.py --arm bandit --seed 0    # a piece: train if it is not, then 16 held-out attacks
    python bench/attackers.py                          # all pieces that are there: JSON, table and figure

A piece takes some 4 minutes on one core. Arms: off (each order in the words of its task), uniform, bandit.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mosaic_fast.cli import options, run_cli

ARMS = ("off", "uniform", "bandit")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5% quantile of Student's t for so many seeds."""


@dataclass(frozen=True)
class Arguments:
    """Train and attack one policy, or draw what all pieces found."""

    arm: Literal["off", "uniform", "bandit"] | None = None
    """How the attacks of training are picked; without it, the pieces are put together."""
    seed: int = 0
    """Seed of the run."""
    steps: tuple[int, ...] = (15, 60)
    """Training steps after which the policy is attacked."""
    tasks: int = 300
    """Held-out tasks, of which a third are injected."""
    attacks: int = 16
    """Attacks a task at most."""
    folder: Path = Path("runs/attackers")
    """Where the runs are."""
    out: Path = Path("bench/results")
    """Where the pieces' figures and attackers.json lie."""
    figure: Path = Path("docs/images/attackers.png")
    """Where the figure goes."""


def main() -> int:
    arguments = options(Arguments, "python bench/attackers.py")
    if arguments.arm is not None:
        _piece(arguments, arguments.arm)
        return 0
    found = _pieces(arguments)
    rows = [row for step in arguments.steps for row in _compared(found, step, arguments.attacks)]
    (arguments.out / "attackers.json").write_text(
        json.dumps({"pieces": [asdict(piece) for piece in found], "compared": rows}, indent=1)
    )
    for row in rows:
        print(json.dumps(row))
    _draw(found, arguments)
    return 0


def _piece(arguments: Arguments, arm: str) -> None:
    run = arguments.folder / f"{arm}-{arguments.seed}"
    last = max(arguments.steps)
    if not (run / "checkpoints" / f"step-{last:06d}").is_dir():
        every = math.gcd(*arguments.steps)
        words = ["--attacks.pick", arm, "--seed", arguments.seed, "--run-dir", run, "--steps", last]
        words += ["--env.eval-tasks", 0, "--model.threads", 1, "--checkpoint.every", every]
        words += ["--checkpoint.keep", last // every, *(["--resume"] if run.exists() else [])]
        _run("mosaic_fast.train", *words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for step in arguments.steps:
        out = arguments.out / f"attackers-{arm}-{arguments.seed}-{step}.json"
        if not out.exists():
            checkpoint = run / "checkpoints" / f"step-{step:06d}"
            words = ["--attack", f"best-of-{arguments.attacks}", "--tasks", arguments.tasks, "--json", out]
            _run("mosaic_fast.evaluate", checkpoint, *words)


def _run(module: str, *words: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, words)], check=True)


@dataclass(frozen=True)
class Piece:
    """What attacks on one policy did."""

    arm: str
    seed: int
    step: int
    tasks: int
    success: dict[int, float]  # number of attacks -> share of tasks on which one of them was obeyed
    worst: str


def _pieces(arguments: Arguments) -> list[Piece]:
    found = []
    for path in sorted(arguments.out.glob("attackers-*-*-*.json")):
        _, arm, seed, step = path.stem.split("-")
        suite = json.loads(path.read_text(encoding="utf-8"))["suites"]["world"]
        success = {int(at): figure["value"] for at, figure in suite["attack"]["success_at"].items()}
        found.append(Piece(arm, int(seed), int(step), suite["tasks"], success, suite["attack"]["worst"]))
    return found


def _compared(found: Sequence[Piece], step: int, most: int) -> list[dict[str, float]]:
    """Bandit less uniform, seed by seed, with Student's 95% interval of the mean."""
    rows = []
    for at in (1, most):
        arms = {arm: {p.seed: p.success[at] for p in found if (p.arm, p.step) == (arm, step)} for arm in ARMS}
        seeds = sorted(arms["uniform"].keys() & arms["bandit"].keys())
        n = len(seeds)
        if n < 2:
            continue
        differences = [arms["bandit"][seed] - arms["uniform"][seed] for seed in seeds]
        mean, half = float(np.mean(differences)), T95[n] * float(np.std(differences, ddof=1)) / math.sqrt(n)
        means = {arm: float(np.mean([*values.values()])) for arm, values in arms.items() if values}
        about = {"step": step, "success_at": at, "seeds": n, **means}
        rows.append({**about, "difference": mean, "low": mean - half, "high": mean + half})
    return rows


def _draw(found: Sequence[Piece], arguments: Arguments) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(arguments.steps), squeeze=False)[0]
    colours = dict(zip(ARMS, ("tab:grey", "tab:blue", "tab:red"), strict=True))
    for axis, step in zip(axes, arguments.steps, strict=True):
        for arm, colour in colours.items():
            rows = [piece.success for piece in found if (piece.arm, piece.step) == (arm, step)]
            for success in rows:
                axis.plot(list(success), list(success.values()), color=colour, alpha=0.25, linewidth=1)
            if rows:
                places = sorted(rows[0])
                means = [float(np.mean([success[at] for success in rows])) for at in places]
                label = f"{arm} ({len(rows)} seeds)"
                axis.plot(places, means, "o-", color=colour, linewidth=2, label=label)
        axis.set_xscale("log", base=2)
        ticks = sorted({at for piece in found for at in piece.success})
        axis.set_xticks(ticks, [str(at) for at in ticks])
        axis.set(title=f"after {step} steps", xlabel="held-out attacks tried", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("tasks on which one was obeyed")
    figure.savefig(arguments.figure, dpi=110)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
