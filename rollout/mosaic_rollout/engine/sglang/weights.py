"""How a trainer's weights reach a server: through a folder, as shared tensors, or over a process group."""

from __future__ import annotations

import base64
import contextlib
import io
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError

from mosaic_rollout.engine.errors import EngineError
from mosaic_rollout.engine.sglang.client import ServerRefusedError, SGLangClient
from mosaic_rollout.engine.sglang.weight_group import WeightGroup
from mosaic_rollout.types import JsonValue

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
    ForkingPickler(buffer).dump(list(bucket))
    return base64.b64encode(buffer.getvalue()).decode()
