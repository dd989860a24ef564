"""A rank that hangs, with its connections intact, is noticed by the one that listens to it."""

from __future__ import annotations

import subprocess
import sys

RANK = """
import time, torch.distributed as dist
from mosaic_fast.distributed import watch
watch.SILENCE_S = 1.0
store = dist.HashStore()
store.set("name/1", "rank 1 (process 7 on node)")
store.add("beat/1", 1)  # its last
{ended}
with watch.Watch(store, 0, 2, "rank 0"):
    time.sleep({waits})
print("undisturbed")
"""


def rank_beside_a_silent_one(ended: str, waits: float) -> subprocess.CompletedProcess[str]:
    program = RANK.format(ended=ended, waits=waits)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_silent_rank_ends_the_others_though_their_main_thread_waits():
    done = rank_beside_a_silent_one("", 40)
    assert done.returncode == 1
    assert "error: rank 1 (process 7 on node) has said nothing for 1 s; the job ends" in done.stderr
    assert not done.stdout


def test_a_rank_that_has_ended_by_itself_may_be_silent():
    done = rank_beside_a_silent_one('store.set("ended/1", "")', 4)
    assert (done.returncode, done.stdout) == (0, "undisturbed\n")
