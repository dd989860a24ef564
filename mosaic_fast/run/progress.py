"""Progress on the terminal: a table that redraws itself, or a line a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mosaic_fast.cli import plain_console

_COLUMNS = {  # metric -> (head, format)
    "step": ("step", "{:.0f}"),
    "safety/harmful_refused": ("harmful\nrefused", "{:.0%}"),
    "safety/benign_done": ("benign\ndone", "{:.0%}"),
    "safety/injection_harm": ("injection\nharm", "{:.0%}"),
    "safety/injected_done": ("injected\ndone", "{:.0%}"),
    "reward/format": ("r_fmt", "{:.2f}"),
    "policy/nll": ("nll", "{:.3f}"),
    "rollout/gate_rate": ("checks", "{:.0%}"),
    "policy/kl": ("KL", "{:.3f}"),
    "policy/clip_frac": ("clipped", "{:.1%}"),
    "tree/sharing": ("raw/\nunique", "{:.2f}x"),
    "tree/engine_prefix_hit": ("prefix\nhit", "{:.0%}"),
    "time/step_s": ("s/step", "{:.1f}"),
}
_LESS_NEEDED = (
    "reward/format",
    "policy/clip_frac",
    "tree/engine_prefix_hit",
    "policy/kl",
    "tree/sharing",
    "policy/nll",
)
"""Columns that a narrow terminal does without, the first one first."""
_ROWS_SHOWN = 12


class ProgressView:
    """Shows training steps as they come. mode: live, plain, quiet, or auto (live on a terminal)."""

    def __init__(self, mode: str, total_steps: int, done: int) -> None:
        self.console = plain_console(quiet=mode == "quiet")
        self._is_live = mode == "live" or (mode == "auto" and self.console.is_terminal)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=done)
        self._rows: list[dict[str, float]] = []
        self._live = Live(self._bar, console=self.console, refresh_per_second=4) if self._is_live else None

    def __enter__(self) -> ProgressView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def step(self, row: Mapping[str, float], notes: Sequence[str] = ()) -> None:
        """Show one finished step, and what is to be said of it: in its line, or above a table."""
        self._bar.advance(self._task)
        self._rows = [*self._rows, dict(row)][-_ROWS_SHOWN:]
        if self._live is not None:
            self._live.update(Group(self._table(), self._bar))
            for note in notes:
                self.say(f"step {row['step']:.0f}: {note}")
        else:
            cells = (
                f"{head.replace(chr(10), ' ').replace('/ ', '/')} {style.format(row[name])}"
                for name, (head, style) in _COLUMNS.items()
                if name in row
            )
            self.say("  ".join([*cells, *(f"! {note}" for note in notes)]))

    def _table(self) -> Table:
        there = [name for name in _COLUMNS if any(name in row for row in self._rows)]
        columns = {name: self._column(name) for name in there}
        for name in _LESS_NEEDED:
            if sum(_widest(column) + 2 for column in columns.values()) - 2 > self.console.width:
                columns.pop(name, None)
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        for head, *_ in columns.values():
            table.add_column(head, justify="right", no_wrap=True)
        for row in zip(*(cells for _, *cells in columns.values()), strict=True):
            table.add_row(*row)
        return table

    def _column(self, name: str) -> list[str]:
        """The head of a column and a cell a row."""
        head, style = _COLUMNS[name]
        return [head, *(style.format(row[name]) if name in row else "-" for row in self._rows)]


def _widest(column: list[str]) -> int:
    """Characters of a column's widest line."""
    return max(len(line) for cell in column for line in cell.splitlines())
