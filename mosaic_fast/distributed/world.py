"""The ranks of a run: one process alone, or those that torchrun started, and how their job ends.

Every rank tells the others once a second that it lives. One that falls silent ends the job at once, where a
collective would wait for its timeout; and of several ranks that find the same mistake, one says it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mosaic_fast.errors import UserError
from mosaic_rollout.types import JsonValue

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
    """The id of a process's parent, from Linux's /proc."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _say(what: str) -> None:
    text = "the job ends. The last checkpoint is intact: start the job again with --resume"
    print(f"error: {what}; {text}", file=sys.stderr, flush=True)


EXCHANGE_TIMEOUT = timedelta(hours=12)
"""For what ranks tell each other between passes: one may judge or play for long. `Watch` notices the dead."""
PASS_TIMEOUT = timedelta(minutes=10)
"""For the collectives inside a pass, at which all ranks arrive together."""


@dataclass(frozen=True)
class World:
    """Who takes part. What ranks tell each other is JSON or plain tensors, never a pickle."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    exchange: dist.ProcessGroup | None = None  # gloo, with the long timeout
    watch: Watch | None = None
    local_size: int = 1  # ranks on this node

    @property
    def is_first(self) -> bool:
        """True for the one rank that writes files, asks judges and speaks on the terminal."""
        return self.rank == 0

    def mesh(self, device: torch.device) -> DeviceMesh:
        """All ranks in a row, on their devices. UserError where this one has no GPU of its own."""
        if device.type == "cuda" and self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this node has {torch.cuda.device_count()} GPUs, and none for its process "
                f"{self.local_rank + 1}; start torchrun with a smaller --nproc-per-node"
            )
        return init_device_mesh(device.type, (self.size,))

    def gather(self, value: JsonValue) -> list[JsonValue]:
        """Every rank's value in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=self.exchange)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        every = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(every, padded, group=self.exchange)
        return [json.loads(bytes(one[: int(size)].numpy())) for one, size in zip(every, sizes, strict=True)]

    def from_first(self, value: JsonValue) -> JsonValue:
        """The first rank's value, on every rank. What the others hand over does not matter."""
        if self.size == 1:
            return value
        own = torch.zeros(0, dtype=torch.uint8)
        if self.is_first:
            own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(own)])
        dist.broadcast(size, 0, group=self.exchange)
        if not self.is_first:
            own = torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(own, 0, group=self.exchange)
        return json.loads(bytes(own.numpy()))

    def sum(self, values: Tensor) -> Tensor:
        """The ranks' sum, the same bits on all of them, on a CPU or a GPU."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def maximum(self, value: int) -> int:
        """The largest of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        largest = torch.tensor([value])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.exchange)
        return int(largest)


ALONE = World()
"""The world of one process."""


@contextmanager
def joined_world() -> Iterator[World]:
    """The world that the launcher's variables describe; one process where there are none.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are torchrun's; an empty one is a missing one.
    UserError where one is missing or no number, or where MOSAIC_SILENCE_S is no number of seconds.
    """
    if _number("WORLD_SIZE", 1) <= 1:
        yield ALONE
        return
    missing = [
        name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name, "").strip()
    ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start the run "
            "with torchrun, or unset WORLD_SIZE for a run of one process"
        )
    silence_s = silence_limit()
    local_rank, local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    _number("RANK", 0), _number("MASTER_PORT", 0)  # read by torch, which names neither
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=PASS_TIMEOUT)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=rank,
            world_size=size,
            timeout=PASS_TIMEOUT,
        )
        group = dist.new_group(backend="gloo", timeout=EXCHANGE_TIMEOUT)
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the ranks do not find each other at {place}: {str(error).splitlines()[0]}"
        ) from None
    assert isinstance(group, dist.ProcessGroup), "every rank is in it"
    name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
    watch = Watch(dist.PrefixStore("watch", store), rank, size, name, silence_s)
    with watch:
        world = World(rank, size, local_rank, group, watch, local_size)
        yield world
        world.gather(None)  # nobody leaves before all are done: one of them may host the store
    dist.destroy_process_group()


def _number(variable: str, without: int) -> int:
    """The number in a launcher's variable; `without` where it is unset or empty."""
    text = os.environ.get(variable, "").strip()
    if text and not text.isdecimal():
        raise UserError(
            f"{variable} is {text[:40]!r}, and must be a number; start the run with torchrun, or unset it"
        )
    return int(text) if text else without


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
