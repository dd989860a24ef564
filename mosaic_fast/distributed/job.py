"""How a rank of a job ends: one message for all ranks, and never a wait for one that is gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from mosaic_fast.distributed.world import LOST, Watch, World, joined_world
from mosaic_fast.errors import UserError

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
MISTAKE = 2


def run_as_rank(command: Callable[[World], int]) -> int:
    """Run a command in the world that the launcher describes; returns the exit code where it ends well.

    Of several ranks only the first to find a mistake says it. A rank that fails leaves at once, whatever
    threads and connections it has: the launcher then ends the others, which may wait for it.
    """
    with joined_world() as world:
        watch = world.watch
        if watch is None:
            return command(world)
        try:
            return command(world)
        except UserError as error:
            _leave(watch, f"error: {error}", MISTAKE)
        except KeyboardInterrupt:
            _leave(watch, "stopped; what the last checkpoint holds is kept", INTERRUPTED)
        except RuntimeError:  # of a collective, perhaps: they have no type of their own
            gone = watch.gone()
            if gone is None:
                raise
            if gone:
                watch.say_lost(gone)
            _leave(watch, "", LOST)


def _leave(watch: Watch, text: str, code: int) -> NoReturn:
    if text and watch.first_to_say(text):
        print(text, file=sys.stderr, flush=True)
    watch.stop()
    sys.stdout.flush()
    os._exit(code)
