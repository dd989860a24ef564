"""The live table: every figure it shows can be read, on any terminal."""

import io

import pytest
from rich.console import Console

from mosaic_fast.run.progress import _COLUMNS, ProgressView

ROW = dict.fromkeys(_COLUMNS, 0.5) | {"step": 12.0}


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_terminal_loses_columns_and_never_parts_of_a_word(width: int) -> None:
    view = ProgressView("plain", total_steps=20, done=0)
    view.step(ROW)
    text = io.StringIO()
    view.console = Console(file=text, width=width)
    view.console.print(view._table())
    shown = text.getvalue()
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "refused" in shown
    assert "injection" in shown
    assert ("prefix" in shown) == (width >= 100)


def test_a_metric_that_a_step_lacks_is_a_dash() -> None:
    view = ProgressView("plain", total_steps=20, done=0)
    view.step({name: value for name, value in ROW.items() if name != "policy/kl"})
    assert view._column("policy/kl") == ["KL", "-"]
