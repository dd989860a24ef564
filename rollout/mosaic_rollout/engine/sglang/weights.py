"""How a trainer's weights reach a server: through a folder, as shared tensors, or over a process group.

A process group is NCCL between GPUs, Gloo between CPUs. The trainer is rank 0 and hosts the rendezvous, the
server's tensor-parallel ranks are 1, 2, ... A group serves many updates. A server that fails during one
leaves the group broken: it is dropped, and the next update joins a new one.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import math
import shutil
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from torch import distributed
from torch.distributed import distributed_c10d
from torch.multiprocessing import reductions

from mosaic_rollout.engine.sglang.client import ServerRefusedError, ServerUnavailableError, SGLangClient
from mosaic_rollout.engine.stats import EngineError
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


Transport = Literal["disk", "tensor", "distributed"]

_BUCKET_BYTES = 512 * 2**20


class WeightSource(Protocol):
    """The trainer's side."""

    def save(self, folder: Path) -> None:
        """Write config.json and safetensors of the current weights, as Hugging Face does."""
        ...

    def named_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The same weights by their Hugging Face names, tied ones once."""
        ...


class WeightFolder:
    """Where weights are put for servers to read: a folder a version, the newest two kept.

    Two, because a server that is being restarted may still be reading the one before.
    """

    def __init__(self, source: WeightSource, root: Path) -> None:
        self._source, self.root = source, root
        self._newest: list[Path] = []  # in the order of publishing: a clock may jump, version numbers go back

    def publish(self, version: int) -> Path:
        """Write the current weights as `version`, complete or not at all; EngineError where it fails."""
        final, unfinished = self.root / f"v{version:06d}", self.root / f".tmp-v{version:06d}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            self._source.save(unfinished)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk, as each library reports it
            shutil.rmtree(unfinished, ignore_errors=True)
            raise EngineError(
                f"the weights for the SGLang server cannot be written to {final}: {error}"
            ) from error
        self._newest = [*(path for path in self._newest if path != final), final][-2:]
        for old in self.root.glob("v[0-9]*"):
            if old not in self._newest:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def remove(self) -> None:
        """Delete every version: what a run keeps are its checkpoints."""
        shutil.rmtree(self.root, ignore_errors=True)


def free_unused_memory() -> None:
    """Give the memory that PyTorch keeps for later tensors back to the GPU, for another process."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


async def load_from_disk(client: SGLangClient, folder: Path, version: int, timeout_s: float) -> None:
    """Replace the server's weights by those of `folder` and empty its cache."""
    body: dict[str, JsonValue] = {
        "model_path": str(folder.absolute()),
        "weight_version": str(version),
        "flush_cache": True,
    }
    await client.call("/update_weights_from_disk", body, timeout_s=timeout_s)


async def load_from_tensors(
    client: SGLangClient,
    tensors: Iterable[tuple[str, torch.Tensor]],
    version: int,
    ranks: int,
    timeout_s: float,
) -> None:
    """Replace the server's weights by tensors it maps from this process, and empty its cache.

    What travels are handles: CUDA IPC on a GPU, shared files on a CPU. The tensors must stay as they are
    until this returns. ranks: the server's tensor parallelism, one list of handles each.
    """
    async with _update_session(client, version, timeout_s):
        for bucket in _buckets(tensors):
            handles = [_handles(bucket) for _ in range(ranks)]  # a handle is taken once
            body: dict[str, JsonValue] = {"serialized_named_tensors": handles, "flush_cache": False}
            await client.call("/update_weights_from_tensor", body, timeout_s=timeout_s)


async def load_over_group(
    client: SGLangClient,
    group: WeightGroup,
    tensors: Iterable[tuple[str, torch.Tensor]],
    version: int,
    timeout_s: float,
) -> None:
    """Replace the server's weights by tensors broadcast to it, and empty its cache.

    After an error the group is of no further use.
    """
    async with _update_session(client, version, timeout_s):
        for bucket in _buckets(tensors):
            await group.send(client, bucket, timeout_s)


@contextlib.asynccontextmanager
async def _update_session(client: SGLangClient, version: int, timeout_s: float) -> AsyncIterator[None]:
    """What SGLang demands around weights that do not come from disk; then the version, and an empty cache."""
    try:
        await client.call("/begin_weight_update", {}, timeout_s=timeout_s)
    except ServerRefusedError:  # a trainer that was killed left its own session open
        await client.call("/end_weight_update", {}, timeout_s=timeout_s)
        await client.call("/begin_weight_update", {}, timeout_s=timeout_s)
    try:
        yield
    finally:
        await client.call("/end_weight_update", {}, timeout_s=timeout_s)
    await client.call(
        "/update_weight_version",
        {"new_version": str(version), "abort_all_requests": False},
        timeout_s=timeout_s,
    )
    await client.flush_cache(30.0)


async def verify_weights(client: SGLangClient, folder: Path, version: int, timeout_s: float) -> None:
    """Prove that every tensor served is the one in `folder`; EngineError where one is not.

    The server's checksums are taken, its tensors overwritten with noise, the folder loaded and the checksums
    taken again. A tensor that the update had left behind, or that loading leaves out, differs. Costs a
    further load; the cache is emptied.
    """
    served = await _checksums(client, timeout_s)
    await client.call("/weights_checker", {"action": "reset_tensors"}, timeout_s=timeout_s)
    noise = await _checksums(client, timeout_s)
    await load_from_disk(client, folder, version, timeout_s)
    trained = await _checksums(client, timeout_s)
    same = sorted(name for name in trained if noise.get(name) == trained[name])
    if same:
        raise EngineError(f"{client.url}: loading {folder} does not set {', '.join(same[:3])}")
    differing = sorted(name for name in trained if served.get(name) != trained[name])
    if differing:
        raise EngineError(
            f"{client.url} did not serve the trained weights of version {version}: {len(differing)} of "
            f"{len(trained)} tensors differ, the first is {differing[0]}"
        )


async def _checksums(client: SGLangClient, timeout_s: float) -> dict[str, str]:
    """Checksum of every tensor of every rank, by "rank/name"."""
    answer = await client.call("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
    ranks = answer.get("ranks")
    if not isinstance(ranks, Sequence) or not ranks:
        raise EngineError(f"{client.url}/weights_checker gave no checksums")
    sums: dict[str, str] = {}
    for number, rank in enumerate(ranks):
        found = rank["checksums"] if isinstance(rank, Mapping) else None
        if not isinstance(found, Mapping):
            raise EngineError(f"{client.url}/weights_checker gave no checksums for rank {number}")
        sums |= {f"{number}/{name}": str(value) for name, value in found.items()}
    return sums


def _buckets(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Runs of tensors of one dtype, each closed once it has _BUCKET_BYTES."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and (size >= _BUCKET_BYTES or tensor.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _handles(bucket: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Pickled shared-memory handles of named tensors, base64."""
    if not any(tensor.is_cuda for _, tensor in bucket):
        # A descriptor cannot be sent over HTTP; a file's name can.
        torch.multiprocessing.set_sharing_strategy("file_system")
        bucket = [(name, tensor.clone()) for name, tensor in bucket]  # sharing would move the trainer's own
    buffer = io.BytesIO()
    _ByUuid(buffer).dump(list(bucket))
    return base64.b64encode(buffer.getvalue()).decode()


_DEVICE = 6  # place of the GPU's index among the arguments that a shared CUDA tensor is made of again


class _ByUuid(ForkingPickler):
    """Names a shared tensor's GPU by its UUID, as SGLang reads it.

    An index counts the GPUs that a process sees, and a server may see others than the trainer.
    """

    def reducer_override(self, obj: object, /) -> Any:
        if not isinstance(obj, torch.Tensor) or not obj.is_cuda:
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(obj)
        uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
        return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
