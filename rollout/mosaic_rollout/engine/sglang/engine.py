"""SGLangEngine: samples from SGLang servers, launched and supervised here or named by URL."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mosaic_rollout.engine.sampling import stream_base
from mosaic_rollout.engine.sglang.client import Sample, ServerRefusedError, ServerUnavailableError
from mosaic_rollout.engine.sglang.lane import FAILURES, Lane, LaneOptions
from mosaic_rollout.engine.sglang.ledger import ServingStats
from mosaic_rollout.engine.sglang.server import ServerOptions, ServerProcess
from mosaic_rollout.engine.sglang.weights import (
    Transport,
    WeightFolder,
    WeightGroup,
    WeightSource,
    free_unused_memory,
    load_from_disk,
    load_from_tensors,
    load_over_group,
    verify_weights,
)
from mosaic_rollout.engine.stats import EngineError, validate_request
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Completion, JsonValue, Request

_VERSION = "0.5.23"
_QUICK_S = 30.0
_MEMORY_S = 300.0
_JOIN_S = 120.0


@dataclass(frozen=True)
class SGLangOptions:
    """What of an engine is not the servers' own (ServerOptions) nor the deadlines' (LaneOptions)."""

    vocab_size: int  # an id outside it would kill the server
    max_tokens: int  # of prompt and completion together
    deterministic: bool = False  # key draws by (seed, rollout, position); the servers must be in that mode
    transport: Transport = "disk"
    changing: bool = False  # the trainer changes its weights while the servers sample
    colocated: bool = False  # servers give their memory back between generations
    verify: bool = False  # prove after every update that the servers have the trained weights


class SGLangEngine:
    """One or more SGLang servers behind the Engine protocol. Use one event loop at a time.

    The servers start at the first `update_weights`, with the trainer's weights. A group's requests go to one
    server (group_key modulo the number of servers), ordered so that a shared prefix is computed once. A
    server that dies or hangs is started again with the same weights and its unfinished requests are sent
    again; after three failures in a row EngineError is raised. Every wait has a deadline.

    servers: ServerOptions to launch `count` servers, or their URLs.
    folder: where weights and logs are put.
    """

    def __init__(
        self,
        weights: WeightSource,
        servers: ServerOptions | Sequence[str],
        options: SGLangOptions,
        deadlines: LaneOptions,
        *,
        folder: Path,
        count: int = 1,
    ) -> None:
        self.options, self.stats = options, ServingStats()
        self._source, self._published = weights, WeightFolder(weights, folder / "weights")
        self._load_s = deadlines.startup_timeout_s  # a start is mostly loading weights, too
        self._version = -1
        self._asleep: dict[Lane, set[str]] = {}  # what a colocated server has given back of its memory
        self._checked: set[Lane] = set()
        self._served: dict[Lane, str] = {}  # the version that a server named last
        self._groups: dict[Lane, WeightGroup] = {}  # joined at the first update that goes over one
        self._folder: Path | None = None  # of the version served, where it has been written
        processes: list[ServerProcess | None] = []
        if isinstance(servers, ServerOptions):
            servers.check()
            processes = [
                ServerProcess(servers, folder / f"server-{index}.log", index) for index in range(count)
            ]
            urls = [""] * count
        else:
            urls = [url.rstrip("/") for url in servers]
            processes = [None] * len(urls)
        self.lanes = [
            Lane(
                process=process,
                url=url,
                options=deadlines,
                stats=self.stats,
                restore=self._restore,
                asleep=lambda lane: bool(self._asleep.get(lane)),
            )
            for process, url in zip(processes, urls, strict=True)
        ]
        atexit.register(self.close)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in order.

        Raises ValueError naming the first bad request (nothing is sent then), EngineError where the servers
        failed three times in a row, RuntimeError before the first update_weights.
        """
        for index, request in enumerate(requests):
            validate_request(index, request, self.options.vocab_size, self.options.max_tokens)
        if self._version < 0:
            raise RuntimeError("generate before the first update_weights: the servers have no weights yet")
        tasks = [asyncio.create_task(self._complete(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # the others' samples are of no use to anyone once one has failed
            await asyncio.gather(*tasks, return_exceptions=True)

    async def update_weights(self, version: int) -> None:
        """Serve the trainer's current weights as `version` on every server; their caches are emptied.

        Starts servers that are not running, and starts again those that fail meanwhile. EngineError where a
        server cannot be started or says afterwards that it serves another version.
        """
        self._version = version
        folder: Path | None = None
        on_disk = (
            self.options.transport == "disk" or self.options.changing
        )  # a server started again needs them
        if on_disk or any(self._starts(lane) for lane in self.lanes):
            folder = self._published.publish(version)
        self._folder = folder
        await asyncio.gather(*(self._bring(lane, version) for lane in self.lanes))

    async def flush(self) -> None:
        """Empty the servers' prefix caches. The servers refuse while requests are in flight."""
        for lane in self.lanes:
            await lane.client.flush_cache(_QUICK_S)
            lane.ledger.clear()

    async def release(self) -> None:
        """Between generations: colocated servers give their memory back until the next update_weights."""
        for lane in self.lanes:
            if self.options.colocated and not self._asleep.get(lane) and self._version >= 0:
                with contextlib.suppress(ServerUnavailableError):  # the next update finds it dead
                    await lane.client.flush_cache(_QUICK_S)
                    body: dict[str, JsonValue] = {"tags": ["kv_cache", "weights"]}
                    await lane.client.call("/release_memory_occupation", body, timeout_s=_MEMORY_S)
                    self._asleep[lane] = {"kv_cache", "weights"}
            await lane.aclose()

    async def _wake(self, lane: Lane, part: str) -> None:
        """Have a server take back a part of the memory that it gave away, if it did.

        Each part is asked for once, whatever becomes of the call: SGLang's scheduler ends when it is told to
        take back what it has. The memory that the trainer's allocator keeps unused is freed for it first.
        """
        asleep = self._asleep.get(lane, set())
        if part not in asleep:
            return
        asleep.remove(part)
        free_unused_memory()
        await lane.client.call("/resume_memory_occupation", {"tags": [part]}, timeout_s=_MEMORY_S)

    async def health(self) -> list[str]:
        """What is wrong with each server, "" where it generates."""
        found = []
        for lane in self.lanes:
            try:
                await lane.client.call("/health_generate", timeout_s=_QUICK_S)
            except EngineError as error:
                found.append(str(error))
            else:
                found.append("")
        return found

    def close(self) -> None:
        """Kill the servers that were launched here, and remove the weights written for them.

        The servers end with this process, too, however it ends.
        """
        for lane in self.lanes:
            self._leave_group(lane)
            if lane.process is not None:
                lane.process.kill()
        self._published.remove()
        atexit.unregister(self.close)

    async def _complete(self, request: Request) -> Completion:
        lane = self.lanes[request.group_key % len(self.lanes)]
        seed = None
        if self.options.deterministic:
            seed = (
                stream_base(request.seed, request.rollout_key) >> 1
            )  # 63 bits: SGLang takes a signed number
        sample = await lane.generate(request, seed)
        if sample.token_ids.max() >= self.options.vocab_size:
            raise EngineError(
                f"{lane.url} sampled token {sample.token_ids.max()}, outside the vocabulary of "
                f"{self.options.vocab_size}: it serves another model"
            )
        return _completion(sample)

    def _starts(self, lane: Lane) -> bool:
        return lane.process is not None and (lane.process.pid is None or lane.process.exit_code is not None)

    async def _bring(self, lane: Lane, version: int) -> None:
        """Bring a server to a version; one that dies or hangs on the way is mended and updated again."""
        for attempt in range(1, FAILURES + 1):
            try:
                await self._update(lane, version)
                if self.options.verify:
                    if self._folder is None:
                        self._folder = self._published.publish(version)
                    await verify_weights(lane.client, self._folder, version, self._load_s)
                await lane.measure()
                lane.succeeded()
                return
            except ServerUnavailableError as error:
                if attempt == FAILURES:
                    raise EngineError(
                        f"an update of the weights failed {FAILURES} times in a row, at last: {error}"
                    ) from error
                await lane.mend(error)

    async def _update(self, lane: Lane, version: int) -> None:
        if self._starts(lane):
            await self._restore(lane)
            return
        await self._check_server(lane)
        await self._wake(lane, "weights")
        await self._load(lane, version)
        await self._wake(lane, "kv_cache")

    async def _load(self, lane: Lane, version: int) -> None:
        if self.options.transport == "disk":
            assert self._folder is not None
            await load_from_disk(lane.client, self._folder, version, self._load_s)
        else:
            info = await lane.client.call("/server_info", timeout_s=_QUICK_S)
            found = info.get("tp_size")
            ranks = found if isinstance(found, int) else 1
            if self.options.transport == "tensor":
                tensors = self._source.named_tensors()
                await load_from_tensors(lane.client, tensors, version, ranks, self._load_s)
            else:
                await self._broadcast(lane, version, ranks, str(info.get("device")))
        await self._check_version(lane, version)
        lane.ledger.clear()

    async def _broadcast(self, lane: Lane, version: int, ranks: int, device: str) -> None:
        tensors = list(self._source.named_tensors())
        here = tensors[0][1].device
        if here.type != device:
            raise UserError(
                f"engine.weights: 'distributed' needs trainer and server on the same kind of device, but the "
                f"weights are on {here.type} and {lane.url} is on {device}; use 'disk'"
            )
        formed_before = lane in self._groups
        try:
            if lane not in self._groups:
                self._groups[lane] = await WeightGroup.join(
                    lane.client, ranks=ranks, device=here, timeout_s=min(self._load_s, _JOIN_S)
                )
            await load_over_group(lane.client, self._groups[lane], tensors, version, self._load_s)
        except BaseException as error:
            self._leave_group(lane)  # a broadcast may be stuck in it
            if not formed_before or not isinstance(error, ServerRefusedError):
                raise
            await self._broadcast(lane, version, ranks, device)  # the server lost it: by a restart, say

    def _leave_group(self, lane: Lane) -> None:
        group = self._groups.pop(lane, None)
        if group is not None:
            group.close()

    async def _restore(self, lane: Lane) -> None:
        """Bring a server, launched anew or come back by itself, to the current weights."""
        self._leave_group(lane)  # the server that was in it is gone
        if self._folder is None:
            self._folder = self._published.publish(self._version)
        if lane.process is not None:
            self._asleep.pop(lane, None)
            if self.options.colocated:
                free_unused_memory()
            await lane.process.start(self._folder, self._version)
        else:
            if await lane.client.weight_version(_QUICK_S) != self._served.get(lane):
                self._asleep.pop(lane, None)  # it was started anew, and has all its memory
            await self._wake(lane, "weights")
            await load_from_disk(lane.client, self._folder, self._version, self._load_s)
            await self._wake(lane, "kv_cache")
        await self._check_version(lane, self._version)

    async def _check_server(self, lane: Lane) -> None:
        """UserError where somebody else's server cannot be used or cannot do what the options ask of it."""
        if lane.process is not None or lane in self._checked:
            return
        self._checked.add(lane)
        if wrong := (await self.health())[self.lanes.index(lane)]:
            raise UserError(f"engine.urls: {wrong}; start that server or mend the address")
        info = await lane.client.call("/server_info", timeout_s=_QUICK_S)
        found = info.get("version")
        if found != _VERSION:
            raise UserError(f"{lane.url} runs SGLang {found}; this engine is built for {_VERSION}")
        if self.options.deterministic and not info.get("enable_deterministic_inference"):
            raise UserError(
                f"engine.deterministic: {lane.url} was not started with --enable-deterministic-inference"
            )

        context = info.get("context_length")
        if isinstance(context, int) and context < self.options.max_tokens:
            raise UserError(
                f"engine.urls: {lane.url} was started with --context-length {context}, and rollouts may have "
                f"{self.options.max_tokens} tokens: start it with a longer one, or lower "
                "rollout.max_rollout_tokens"
            )

    async def _check_version(self, lane: Lane, version: int) -> None:
        served = self._served[lane] = await lane.client.weight_version(_QUICK_S)
        if served != str(version):
            raise EngineError(f"{lane.url} serves weights {served!r} after the update to version {version}")


def _completion(sample: Sample) -> Completion:
    return Completion(
        token_ids=sample.token_ids,
        logprobs=sample.logprobs,
        finish_reason=sample.finish_reason,
        cached_tokens=sample.cached_tokens,
        prompt_tokens=sample.prompt_tokens,
        policy_version=sample.weight_version,
    )
