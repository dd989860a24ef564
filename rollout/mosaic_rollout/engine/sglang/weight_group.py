"""Weights broadcast to one server over a process group: NCCL between GPUs, Gloo between CPUs.

The trainer is rank 0 and hosts the rendezvous, the server's tensor-parallel ranks are 1, 2, ... A group
serves many updates. A server that fails during one leaves the group broken: it is dropped, and the next
update joins a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from mosaic_rollout.engine.errors import EngineError
from mosaic_rollout.engine.sglang.client import ServerUnavailableError, SGLangClient
from mosaic_rollout.types import JsonValue

_T = TypeVar("_T")

_POLL_S = 0.002
_LAST_BYTES_S = 30.0  # after the server has said that it received everything


class WeightGroup:
    """This process and one server. `join` one, `send` buckets inside an update session, `close` it."""

    def __init__(self, name: str, group: distributed.ProcessGroup) -> None:
        self.name, self._group = name, group

    @classmethod
    async def join(
        cls, client: SGLangClient, *, ranks: int, device: torch.device, timeout_s: float
    ) -> WeightGroup:
        """Form the group with a server of `ranks` ranks, for weights that lie on `device`.

        Raises EngineError where server or trainer cannot join, ServerUnavailableError at the deadline.
        """
        if not distributed.is_available():
            raise EngineError("engine.weights: this PyTorch is built without torch.distributed; use 'disk'")
        backend = "nccl" if device.type == "cuda" else "gloo"
        name, host, limit = (
            f"mosaic-{uuid.uuid4().hex}",
            _address_towards(client.url),
            timedelta(seconds=timeout_s),
        )
        store = distributed.TCPStore(
            host, 0, ranks + 1, is_master=True, timeout=limit, wait_for_workers=False
        )
        body: dict[str, JsonValue] = {
            "master_address": host,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": ranks + 1,
            "group_name": name,
            "backend": backend,
        }
        here = _in_thread(lambda: _new_group(name, backend, store, ranks + 1, limit))
        # The server answers when it has joined, or at once that it cannot: then nobody waits for the thread.
        await client.call("/init_weights_update_group", body, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                return cls(name, await here)
        except (RuntimeError, ValueError, OSError, TimeoutError) as error:
            raise ServerUnavailableError(f"{client.url}: no process group for weights: {error}") from error

    async def send(
        self, client: SGLangClient, tensors: Sequence[tuple[str, torch.Tensor]], timeout_s: float
    ) -> None:
        """Broadcast named tensors of one dtype as one message, which the server loads into its model.

        Beside the broadcast runs the request that announces it: a server that refuses does so at once, while
        a broadcast nobody receives would wait. After an error the group is of no further use.
        """
        flat = torch.cat([tensor.detach().flatten().view(torch.uint8) for _, tensor in tensors])
        body: dict[str, JsonValue] = {
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": self.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        work = self._group.broadcast(flat, 0)
        await client.call("/update_weights_from_distributed", body, timeout_s=timeout_s)
        for _ in range(math.ceil(_LAST_BYTES_S / _POLL_S)):
            if work.is_completed():
                return
            await asyncio.sleep(_POLL_S)
        raise ServerUnavailableError(
            f"{client.url}: a broadcast of weights did not end on the trainer's side"
        )

    def close(self) -> None:
        """Leave the group, at once, also where a broadcast is stuck. The server is not told."""
        with contextlib.suppress(RuntimeError):
            self._group.abort()
        with contextlib.suppress(RuntimeError, ValueError):
            distributed.destroy_process_group(self._group)


def _new_group(
    name: str, backend: str, store: distributed.Store, size: int, timeout: timedelta
) -> distributed.ProcessGroup:
    """Rank 0 of a group beside the default one, which need not exist.

    PyTorch's public functions make subgroups of the default group only, to which the server does not belong.
    This is the function they and SGLang call, with the prefix SGLang gives the store: both sides must agree
    on the keys by which they find each other.
    """
    group, _ = distributed_c10d._new_process_group_helper(
        size, 0, [], distributed.Backend(backend), distributed.PrefixStore(name, store),
        group_name=distributed_c10d.GroupName(name), timeout=timeout,
    )  # fmt: skip
    if not isinstance(group, distributed.ProcessGroup):
        raise RuntimeError("the trainer is no member of its own group")
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group


def _address_towards(url: str) -> str:
    """This machine's address as the server of `url` sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends nothing: UDP
        return str(probe.getsockname()[0])


def _in_thread(work: Callable[[], _T]) -> asyncio.Future[_T]:
    """The result of blocking work that has a deadline of its own; a daemon, so that it holds nobody up."""
    done: Future[_T] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except (RuntimeError, ValueError, OSError) as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="weight group").start()
    waiting = asyncio.wrap_future(done)
    waiting.add_done_callback(
        lambda it: it.cancelled() or it.exception()
    )  # seen, also where nobody awaits it
    return waiting
