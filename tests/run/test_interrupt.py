"""A signal at a bad moment: a loop of asyncio is made or closed whole, and the work is stopped after it."""

import asyncio
import signal
import sys
from asyncio.selector_events import BaseSelectorEventLoop

import pytest

from mosaic_fast.run.interrupt import Interrupt, Stopped


@pytest.mark.parametrize("moment", ["_make_self_pipe", "_close_self_pipe"])
def test_a_signal_while_a_loop_is_made_or_closed_stops_the_work_and_says_nothing_else(
    moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    usual = getattr(BaseSelectorEventLoop, moment)

    def signalled(loop: BaseSelectorEventLoop) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(sys, "unraisablehook", ignored.append)
        signal.raise_signal(signal.SIGINT)
        usual(loop)

    monkeypatch.setattr(BaseSelectorEventLoop, moment, signalled)
    with Interrupt() as interrupt, pytest.raises(Stopped):
        _play(interrupt)
    assert not ignored
    assert capsys.readouterr().err == "\nstopping; once more to stop at once\n"


def _play(interrupt: Interrupt) -> None:
    """Steps with a loop each, as those of a run: the second one is never played to its end."""
    with interrupt.abandonable():
        for seconds in (0.5, 60.0):
            asyncio.run(asyncio.sleep(seconds))
