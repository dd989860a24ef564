"""`python -m mosaic_fast.report RUN [RUN2] [--out FILE]`: a run, or two side by side, as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mosaic_fast.cli import options, run_cli
from mosaic_fast.errors import UserError
from mosaic_fast.report.collect import collect_run
from mosaic_fast.report.page import render_page


@dataclass(frozen=True)
class _Arguments:
    """Write one self-contained HTML page of a run: curves, rewards, time, sharing, every trajectory."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, for example runs/<time>-world. It may be unfinished."""
    other: Annotated[Path | None, tyro.conf.Positional] = None
    """A second run folder, shown beside the first."""
    out: Path | None = None
    """File to write; default report.html in the (first) run folder."""
    max_trajectories: int = 20_000
    """Of each run; above it whole training steps are left out, evenly spread."""


def main() -> int:
    arguments = options(_Arguments, "python -m mosaic_fast.report")
    if arguments.max_trajectories < 1:
        raise UserError("--max-trajectories must be at least 1")
    folders = [folder for folder in (arguments.run, arguments.other) if folder is not None]
    out = arguments.out or folders[0] / "report.html"
    runs = [collect_run(folder, arguments.max_trajectories) for folder in folders]
    page = render_page(runs)
    try:
        unfinished = out.with_name(f".tmp-{out.name}")
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}") from None
    for folder, run in zip(folders, runs, strict=True):
        print(f"{folder}: {len(run.rollouts)} trajectories")
        for note in run.notes:
            print(f"  {note}")
    print(f"{out}  {len(page) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
