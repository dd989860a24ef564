"""The ranks of a run: one process alone, or those that torchrun started."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mosaic_fast.distributed.watch import Watch, silence_limit
from mosaic_fast.errors import UserError
from mosaic_rollout.types import JsonValue

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
        """Every rank's value, in the order of ranks."""
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
        """The first rank's value. Others may hand over anything."""
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
        """The largest of the ranks' values."""
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
    local_rank = _number("LOCAL_RANK", 0)
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
        world = World(rank, size, local_rank, group, watch)
        yield world
        world.gather(None)  # nobody leaves before all are done: one of them may host the store
    dist.destroy_process_group()


def _number(variable: str, without: int) -> int:
    """What a launcher's variable says; `without`: where it is unset or empty."""
    text = os.environ.get(variable, "").strip()
    if text and not text.isdecimal():
        raise UserError(
            f"{variable} is {text[:40]!r}, and must be a number; start the run with torchrun, or unset it"
        )
    return int(text) if text else without
