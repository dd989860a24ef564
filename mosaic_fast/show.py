"""Trajectories in the terminal: python -m mosaic_fast.show RUN [--step 12 --kind injected]."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from mosaic_fast.cli import options, plain_console, run_cli
from mosaic_fast.errors import UserError
from mosaic_fast.report.read import Notes, decided, read_groups, require_run_folder, trajectory_files
from mosaic_fast.run.trajectories import RolloutRow, StepRow
from mosaic_rollout.types import Status, TaskKind

_STYLES = {"user": "bold", "plan": "cyan", "check": "yellow", "action": "green", "tool": "dim"}
_HARM = "bold red"
_CONTROLS = {code: "\ufffd" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
"""What would steer the terminal, in a text of a tool's or a model's."""


@dataclass(frozen=True)
class _Arguments:
    """Print the trajectories of a run: request, plan, check, action and observation told apart."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, for example runs/<time>-world. It may be unfinished."""
    step: int | None = None
    """Training step, counted from 1; default: the last one that has trajectories."""
    kind: TaskKind | None = None
    """Only tasks of this kind."""
    status: Status | None = None
    """Only rollouts that ended so."""
    task: str | None = None
    """Only the task of this id."""
    count: int = 4
    """Groups shown, the first ones that fit; 0: all."""


def main() -> int:
    arguments = options(_Arguments, "python -m mosaic_fast.show")
    console = plain_console()
    notes = Notes()
    step, path = _file(arguments.run, arguments.step)
    shown = 0
    for group in read_groups(path, notes):
        fitting = [row for row in group if _fits(row, arguments)]
        if not fitting:
            continue
        if arguments.count and shown == arguments.count:
            console.print(f"more groups fit; --count 0 shows all (--count is {arguments.count})", style="dim")
            break
        shown += 1
        _print_group(console, step, group, fitting)
    for note in notes.texts:
        console.print(note, style="dim")
    if not shown:
        raise UserError(
            f"step {step} of {arguments.run} has no such trajectory; leave out --kind, --status, --task"
        )
    return 0


def _file(folder: Path, step: int | None) -> tuple[int, Path]:
    """The trajectories of a step, or of the last one. UserError where there are none."""
    require_run_folder(folder)
    files = dict(trajectory_files(folder))
    if not files:
        raise UserError(f"{folder} holds no trajectories yet")
    wanted = max(files) if step is None else step
    if wanted not in files:
        raise UserError(
            f"--step: {folder} has trajectories of steps {min(files)} to {max(files)}, not of {wanted}"
        )
    return wanted, files[wanted]


def _fits(row: RolloutRow, wanted: _Arguments) -> bool:
    pairs = ((wanted.kind, row.kind), (wanted.status, row.status), (wanted.task, row.task_id))
    return all(asked is None or asked == found for asked, found in pairs)


def _print_group(
    console: Console, step: int, group: Sequence[RolloutRow], fitting: Sequence[RolloutRow]
) -> None:
    first = group[0]
    console.rule(Text(f"step {step}  task {first.task_id}  {first.kind}"), align="left")
    for role, text in _opening(first):
        _line(console, role, text)
    for row in fitting:
        _print_rollout(console, row)
    _print_preferences(console, group)


def _opening(row: RolloutRow) -> Iterator[tuple[str, str]]:
    """What the user asked: the last opening message of the user's, without the system's."""
    asked = [message for message in row.messages if message.get("role") == "user"]
    if asked:
        yield "user", str(asked[-1].get("content") or "")


def _print_rollout(console: Console, row: RolloutRow) -> None:
    ended = "harm" if row.harm else "done" if row.done else f"progress {row.progress:.2g}"
    reward = "" if row.reward.total is None else f"  reward {row.reward.total:.2f}"
    advantage = "" if row.advantage is None else f"  advantage {row.advantage:+.2f}"
    forked = "" if row.parent_id is None else f"  forked from #{row.parent_id}"
    head = f"#{row.rollout_id}  {row.status}, {ended}{reward}{advantage}{forked}"
    console.print(Text(head, style=_HARM if row.harm else "bold"))
    for step in row.steps:
        for role, text in _parts(step):
            _line(console, role, text)


def _parts(step: StepRow) -> Iterator[tuple[str, str]]:
    """What a turn holds, in its order."""
    if step.plan:
        yield "plan", step.plan
    if step.check:
        yield "check", step.check
    if step.call is not None:
        arguments = ", ".join(
            f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in step.call.arguments.items()
        )
        yield "action", f"{step.call.name}({arguments})"
    else:
        yield "action", step.answer or f"cannot be read: {step.text}"
    if step.observation is not None:
        yield "tool" if step.call is not None else "user", step.observation


def _line(console: Console, role: str, text: str) -> None:
    """A part with its name, further lines below the text."""
    head = f"  {role:7} "
    lines = text.strip().translate(_CONTROLS).splitlines() or [""]
    console.print(Text(head + f"\n{' ' * len(head)}".join(lines), style=_STYLES[role]), soft_wrap=True)


def _print_preferences(console: Console, group: Sequence[RolloutRow]) -> None:
    """Who was preferred over whom, with the judge's reasons."""
    matrix = decided(group)
    if matrix is None or len(group) < 2:
        return
    for i, row in enumerate(group):
        for j in range(i + 1, len(group)):
            sign = ">" if matrix[i][j] > 0.5 else "<" if matrix[i][j] < 0.5 else "="
            reason = (row.reasons[j] if j < len(row.reasons) else "").translate(_CONTROLS)
            line = f"  #{row.rollout_id} {sign} #{group[j].rollout_id}  {reason}"
            console.print(Text(line, style="dim"), soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
