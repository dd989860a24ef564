"""Every rank tells once a second that it lives: one that falls silent ends the job, not a timeout."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType

import torch.distributed as dist

BEAT_S = 1.0
SILENCE_S = 30.0
"""A rank that has said nothing for so long is dead or stuck. A long call into C may hold one up."""
SETTLE_S = 3.5
"""How long ranks listen to each other once a collective has failed, to tell who is gone."""
STORE_GONE = "the process that hosts the job's store is gone"
LOST = 1  # exit code of a rank that ends because another one is gone


class Watch:
    """Beats in a thread while entered, and listens to the next rank, the last one to the first.

    In a ring every silent rank, or block of silent ranks, has a living one before it that notices.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, name: str) -> None:
        self._store, self._rank, self._size = store, rank, size
        store.set(f"name/{rank}", name)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
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
            text = "the job ends. The last checkpoint is intact: start the job again with --resume"
            print(f"error: {what}; {text}", file=sys.stderr, flush=True)

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
        heard, when = -1, time.monotonic()
        while not self._over.wait(BEAT_S):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                beat = self._store.add(f"beat/{beside}", 0)
                ended = self._store.check([f"ended/{beside}"])
                name = self._name(beside)
            except RuntimeError:
                self._end(STORE_GONE)
                return
            now = time.monotonic()
            if beat != heard or ended:
                heard, when = beat, now
            elif now - when > SILENCE_S:
                self._end(f"{name} has said nothing for {SILENCE_S:.0f} s")

    def _end(self, what: str) -> None:
        """End this process from its thread: the main one may wait for the silent rank for ever."""
        if self._over.is_set():
            return
        self.say_lost(what)
        os._exit(LOST)
