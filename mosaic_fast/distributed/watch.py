"""Every rank tells once a second that it lives: one that falls silent ends the job, not a timeout."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from mosaic_fast.errors import UserError

BEAT_S = 1.0
SILENCE_S = 30.0
"""A rank that has said nothing for so long is stuck, unless SILENCE_VARIABLE says otherwise."""
SILENCE_VARIABLE = "MOSAIC_SILENCE_S"
_SHORTEST_SILENCE_S = 3.0  # a few beats
SETTLE_S = 3.5
"""How long ranks listen to each other once a collective has failed, to tell who is gone."""
STORE_GONE = "the process that hosts the job's store is gone"
STORE_SILENT = "the process that hosts the job's store has said nothing for {:.0f} s"
LOST = 1  # exit code of a rank that ends because another one is gone


def silence_limit() -> float:
    """Seconds without a word after which a rank counts as stuck. UserError for what is no such number."""
    text = os.environ.get(SILENCE_VARIABLE, "")
    if not text:
        return SILENCE_S
    with suppress(ValueError):
        if _SHORTEST_SILENCE_S <= (seconds := float(text)) < float("inf"):
            return seconds
    raise UserError(
        f"the variable {SILENCE_VARIABLE} is {text[:40]!r}; it must be the seconds, "
        f"{_SHORTEST_SILENCE_S:.0f} or more, after which a rank that says nothing ends the job (without it: "
        f"{SILENCE_S:.0f})"
    )


class Watch:
    """Beats in a thread while entered, and listens to the next rank, the last one to the first.

    In a ring every silent rank, or block of silent ranks, has a living one before it that notices. Silence
    is counted in beats of one's own, not by a clock: a job that was stopped as a whole goes on unharmed.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, name: str, silence_s: float = SILENCE_S
    ) -> None:
        self._store, self._rank, self._size, self._silence_s = store, rank, size, silence_s
        store.set(f"name/{rank}", name)
        store.set(f"process/{rank}", f"{os.getppid()} {os.getpid()} {socket.gethostname()}")
        self._over = threading.Event()
        self._rounds = 0  # talks with the store that came to an end
        self._threads = [
            threading.Thread(target=self._run, name="watch", daemon=True),
            threading.Thread(target=self._watch_store, name="watch of the store", daemon=True),
        ]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Say that this rank has ended by itself, and stop listening."""
        self._over.set()
        with suppress(RuntimeError):  # the store's host is gone
            self._store.set(f"ended/{self._rank}", "")

    def first_to_say(self, text: str) -> bool:
        """True on the first rank that wants to say this: several ranks find the same mistake."""
        try:
            return self._store.add(f"said/{text}", 1) == 1
        except RuntimeError:
            return True

    def say_lost(self, what: str) -> None:
        """Say, once for all ranks, that the job ends because of one."""
        if self.first_to_say("lost"):
            _say(what)

    def gone(self) -> str | None:
        """Who is gone, asked after a collective has failed: those that say nothing for a few seconds.

        Empty where ranks have ended by themselves and said why; None where all are there.
        """
        try:
            before = self._beats()
            time.sleep(SETTLE_S)
            after = self._beats()
            ended = {rank for rank in range(self._size) if self._store.check([f"ended/{rank}"])}
            silent = [rank for rank in range(self._size) if before[rank] == after[rank]]
            names = [self._name(rank) for rank in silent if rank not in ended | {self._rank}]
        except RuntimeError:
            return STORE_GONE
        if names:
            return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} gone"
        return "" if ended else None

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._size)]

    def _name(self, rank: int) -> str:
        key = f"name/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else f"rank {rank}"

    def _run(self) -> None:
        beside = (self._rank + 1) % self._size
        heard, silent = -1, 0
        while not self._over.wait(BEAT_S):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                beat = self._store.add(f"beat/{beside}", 0)
                ended = self._store.check([f"ended/{beside}"])
                name = self._name(beside)
            except RuntimeError:
                self._end(STORE_GONE)
                return
            self._rounds += 1
            silent = 0 if beat != heard or ended else silent + 1
            heard = beat
            if silent * BEAT_S > self._silence_s and not self._over.is_set():
                self.say_lost(f"{name} has said nothing for {self._silence_s:.0f} s")
                with suppress(RuntimeError, OSError):
                    self._kill(beside)
                os._exit(LOST)

    def _watch_store(self) -> None:
        """End this process where the store's host hangs: no call to it returns, nor has a deadline."""
        seen, silent = -1, 0
        while not self._over.wait(BEAT_S):
            silent = 0 if self._rounds != seen else silent + 1
            seen = self._rounds
            if silent * BEAT_S > self._silence_s and not self._over.is_set():
                _say(STORE_SILENT.format(self._silence_s))  # by every rank: only the store knows of others
                os._exit(LOST)

    def _end(self, what: str) -> None:
        """End this process from its thread: the main one may wait for the silent rank for ever."""
        if self._over.is_set():
            return
        self.say_lost(what)
        os._exit(LOST)

    def _kill(self, rank: int) -> None:
        """Kill a stuck rank of the launcher that this one is of.

        A stopped process heeds no SIGTERM, and the launcher would give it half a minute.
        """
        if not self._store.check([key := f"process/{rank}"]):  # `get` would wait for it
            return
        parent, process, host = self._store.get(key).decode().split(" ", 2)
        ours = os.getppid()
        if (int(parent), host) == (ours, socket.gethostname()) and ours > 1 and _parent(int(process)) == ours:
            os.kill(int(process), signal.SIGKILL)


def _parent(process: int) -> int:
    """Its parent's id, by Linux's /proc."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _say(what: str) -> None:
    text = "the job ends. The last checkpoint is intact: start the job again with --resume"
    print(f"error: {what}; {text}", file=sys.stderr, flush=True)
