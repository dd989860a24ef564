"""python -m tests.fuzz [--inputs 10000] [--seed 0] [--only NAME] [--first N]: status 1 on any failure."""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before torch is imported
    from mosaic_fast.cli import answer_at_once
    from tests.fuzz.arguments import parse

    answer_at_once(parse)

import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.fuzz.arguments import parse
from tests.fuzz.subject import Result, fuzz
from tests.fuzz.subjects import SUBJECTS


def main() -> int:
    arguments = parse()
    subjects = [subject for subject in SUBJECTS if arguments.only in (None, subject.name)]
    if not subjects:
        sys.exit(f"--only: there are {', '.join(repr(subject.name) for subject in SUBJECTS)}")
    total = sum(subject.share for subject in subjects)
    console, start, results = Console(), time.monotonic(), dict[str, Result]()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with bar, tempfile.TemporaryDirectory() as folder:
        for number, subject in enumerate(subjects):
            count = max(1, round(arguments.inputs * subject.share / total))
            task = bar.add_task(subject.name, total=count)
            inputs = range(arguments.first, arguments.first + count)
            place = Path(folder, str(number))
            results[subject.name] = fuzz(
                subject, place, arguments.seed, inputs, lambda task=task: bar.advance(task)
            )
    failures = [f"{name}, {failure}" for name, result in results.items() for failure in result.failures]
    console.print(_table(results))
    console.print(f"{time.monotonic() - start:.0f} s")
    for failure in failures[:50]:
        console.print(f"FAILED: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    if arguments.out:
        found = {name: dict(result.outcomes) for name, result in results.items()}
        arguments.out.write_text(
            json.dumps({"seed": arguments.seed, "outcomes": found, "failures": failures}, indent=1)
        )
    return 1 if failures else 0


def _table(results: dict[str, Result]) -> Table:
    table = Table("", "inputs", "failures", "what came of them")
    for name, result in results.items():
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in sorted(result.outcomes.items()))
        inputs = result.outcomes.total() + len(result.failures)
        table.add_row(name, str(inputs), str(len(result.failures)), outcomes)
    inputs = sum(result.outcomes.total() + len(result.failures) for result in results.values())
    table.add_section()
    table.add_row("all", str(inputs), str(sum(len(result.failures) for result in results.values())), "")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
