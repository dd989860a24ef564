"""kill -9 at random moments, resumed each time: python -m tools.soak [--kills 200] [--seed 0] [--dir D]

A short run of the embedded agent is trained once undisturbed. Then it is started anew, killed and resumed
until it is complete, and compared with the first one bit for bit; again and again, until there were as many
kills as asked for. Exit status 0: nothing was lost; 1: something was, and what that was is printed.
"""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before torch is imported
    from mosaic_fast.cli import answer_at_once
    from tools.soak.arguments import parse

    answer_at_once(parse)

import json
import os
import platform
import random
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mosaic_fast.cli import plain_console, run_cli
from mosaic_fast.errors import UserError
from tools.soak.arguments import parse
from tools.soak.campaign import Campaign, Tally
from tools.soak.victim import PHASES, Timing


def main() -> int:
    arguments = parse()
    for name in ("kills", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be 1 or more")
    folder = Path(arguments.dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-soak")
    try:
        folder.mkdir(parents=True, exist_ok=arguments.dir is not None)
        if any(folder.iterdir()):
            raise UserError(f"--dir {folder} is not empty; name another folder")
    except OSError as error:
        raise UserError(f"--dir {folder} cannot be used: {error.strerror}") from None
    console, start = plain_console(), time.monotonic()
    campaign = Campaign(folder, arguments.steps)
    console.print(
        f"the undisturbed run, {arguments.steps} steps, in {folder}", highlight=False, soft_wrap=True
    )
    timing = campaign.train_undisturbed()
    tally = _kill(campaign, arguments.kills, random.Random(arguments.seed), timing, console)
    result = {
        "kills": tally.killed,
        "killed_in": {phase: tally.kills[phase] for phase in PHASES},
        "runs_compared": tally.runs,
        "finished_trajectories": tally.trajectories,
        "finished_trajectories_lost": tally.lost,
        "losses": tally.losses,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "seconds": round(time.monotonic() - start, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    (folder / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(_table(tally))
    console.print(f"{result['seconds']} s; {folder / 'soak.json'}", highlight=False, soft_wrap=True)
    for loss in tally.losses:
        console.print(f"LOST: {loss}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if tally.losses else 0


def _kill(campaign: Campaign, kills: int, random: random.Random, timing: Timing, console: Console) -> Tally:
    """The campaign with a bar; a line for each completed run besides."""
    bar = Progress(
        TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    told = 0

    def tell(tally: Tally) -> None:
        nonlocal told
        bar.update(task, completed=tally.killed)
        if tally.runs > told:
            told = tally.runs
            console.print(
                f"run {told}: complete after {tally.killed} kills in all, {len(tally.losses)} losses",
                highlight=False,
            )

    with bar:
        task = bar.add_task("", total=kills)
        return campaign.kill_and_resume(kills, random, timing, tell)


def _table(tally: Tally) -> Table:
    table = Table("", "count")
    table.columns[1].justify = "right"
    for phase in PHASES:
        table.add_row(f"kill -9 during {phase}", str(tally.kills[phase]))
    table.add_section()
    table.add_row("kills", str(tally.killed))
    table.add_row("runs completed and compared, bit for bit", str(tally.runs))
    table.add_row("finished trajectories on disk at a kill", str(tally.trajectories))
    table.add_row("of these lost", str(tally.lost))
    table.add_row("losses", str(len(tally.losses)), style="red" if tally.losses else "green")
    return table


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
