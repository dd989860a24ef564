"""A rank that hangs, with its connections intact, is noticed by the one that listens to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from mosaic_fast.distributed.world import SILENCE_S, SILENCE_VARIABLE, silence_limit
from mosaic_fast.errors import UserError

Ranks = dict[str, subprocess.Popen[str]]

RANK = """
import os, signal, time
import torch.distributed as dist
from mosaic_fast.distributed.world import Watch
store = dist.HashStore()
store.set("name/1", "rank 1 (process 7 on node)")
store.add("beat/1", 1)  # its last
{first}
with Watch(store, 0, 2, "rank 0", silence_s=1.0) as watch:
    {then}
    time.sleep({waits})
print("undisturbed")
"""
STORE_OF_ANOTHER = """
here, there = os.pipe()
if (host := os.fork()) == 0:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(there, str(store.port).encode())
    time.sleep(60)
    os._exit(0)
store = dist.TCPStore("127.0.0.1", int(os.read(here, 9)), is_master=False, wait_for_workers=False)
"""
STOPPED_FOR_LONG = """
    def looked(times):
        while watch._rounds < times:
            time.sleep(0.01)
    looked(1)  # it has been heard once
    if os.fork() == 0:
        time.sleep(3)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    looked(2)  # it is looked for before it has said anything again
    store.add("beat/1", 1)
"""
CASES = {  # name -> (before it watches, while it watches, seconds that its main thread waits then)
    "silent": ("", "", 40),
    "ended": ('store.set("ended/1", "")', "", 4),
    "host stopped": (STORE_OF_ANOTHER, "os.kill(host, signal.SIGSTOP)", 40),
    "all stopped": ("", STOPPED_FOR_LONG, 0.8),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A process a case, all at once: most of their time they wait."""
    with ExitStack() as stack:
        running = {}
        for name, (first, then, waits) in CASES.items():
            program = RANK.format(first=first, then=then, waits=waits)
            running[name] = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
            stack.callback(end, running[name].pid)
        yield running


def end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def test_a_silent_rank_ends_the_others_though_their_main_thread_waits(ranks: Ranks):
    out, err = ranks["silent"].communicate(timeout=600)
    assert ranks["silent"].returncode == 1
    assert "error: rank 1 (process 7 on node) has said nothing for 1 s; the job ends" in err
    assert not out


def test_a_rank_that_has_ended_by_itself_may_be_silent(ranks: Ranks):
    out, err = ranks["ended"].communicate(timeout=600)
    assert (ranks["ended"].returncode, out) == (0, "undisturbed\n"), err


def test_a_host_of_the_store_that_hangs_ends_the_job(ranks: Ranks):
    """No call to the store comes back then, nor has one a deadline."""
    out, err = ranks["host stopped"].communicate(timeout=600)
    assert ranks["host stopped"].returncode == 1
    assert "error: the process that hosts the job's store has said nothing for 1 s; the job ends" in err
    assert not out


def test_a_job_that_was_stopped_and_goes_on_is_not_taken_for_silent(ranks: Ranks):
    """Stopped for longer than the limit, with all its ranks: nobody spoke, and nobody listened."""
    out, err = ranks["all stopped"].communicate(timeout=600)
    assert (ranks["all stopped"].returncode, out) == (0, "undisturbed\n"), err


def test_a_stopped_rank_is_killed_by_the_one_that_noticed():
    """It heeds no SIGTERM: the launcher alone would wait 30 s more for it."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stuck:
        stuck.send_signal(signal.SIGSTOP)
        noticing = f"""
import os, socket
import torch.distributed as dist
from mosaic_fast.distributed.world import Watch
store = dist.HashStore()
store.set("process/1", f"{{os.getppid()}} {stuck.pid} {{socket.gethostname()}}")
Watch(store, 0, 2, "rank 0")._kill(1)
"""
        try:
            subprocess.run([sys.executable, "-c", noticing], check=True, timeout=600)
            assert stuck.wait(timeout=600) == -signal.SIGKILL
        finally:
            stuck.kill()


@pytest.mark.parametrize("text", ["", "3", "120.5"])
def test_the_limit_is_the_variables(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv(SILENCE_VARIABLE, text)
    assert silence_limit() == float(text or SILENCE_S)


@pytest.mark.parametrize("text", ["2", "-1", "nan", "inf", "soon"])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv(SILENCE_VARIABLE, text)
    with pytest.raises(UserError, match=f"MOSAIC_SILENCE_S is '{text}'; it must be the seconds, 3 or more"):
        silence_limit()
