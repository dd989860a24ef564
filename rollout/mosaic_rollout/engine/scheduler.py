"""The synchronous heart of the engine: admit, prefill, decode one token for every row, let finished rows go.

Continuous batching as in Orca (Yu et al., OSDI 2022): rows join and leave between any two iterations.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from mosaic_rollout.engine.adapter import CausalModel
from mosaic_rollout.engine.prefill import pending_nodes, prefill
from mosaic_rollout.engine.radix import Node, RadixTree
from mosaic_rollout.engine.rows import KeyValuePool, RowBuffer
from mosaic_rollout.engine.sampling import sample_tokens, stream_base, uniforms
from mosaic_rollout.engine.stats import EngineStats, NonFiniteLogitsError
from mosaic_rollout.types import Completion, FinishReason, Request

_KEPT_BYTES = 128 * 2**20
_PATIENCE = 3
"""Iterations a job may wait for others: a prefill costs a forward, however few it serves."""


@dataclass(eq=False)
class Job:
    """One request on its way. `done` takes its completion, `abandoned` says nobody waits any more."""

    request: Request
    done: Callable[[Completion], None]
    abandoned: Callable[[], bool]
    cached_tokens: int = 0
    asked: float = field(default_factory=time.perf_counter)
    first_token_s: float = 0.0  # after it was asked
    tokens: list[int] = field(default_factory=list)  # sampled so far
    logprobs: list[float] = field(default_factory=list)

    @property
    def prompt(self) -> np.ndarray:
        return self.request.token_ids

    def sequence(self) -> np.ndarray:
        return np.concatenate([self.prompt, np.array(self.tokens, np.int64)])


class Scheduler:
    """Waiting jobs, active rows, radix tree. `step` does one iteration of all."""

    def __init__(
        self, model: CausalModel, *, max_batch: int, max_cached_tokens: int, prefill_chunk_tokens: int
    ) -> None:
        self.model = model
        self.max_batch = max_batch
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.policy_version = 0
        self.stats = EngineStats()
        self.tree = RadixTree(KeyValuePool(model.shape), max_cached_tokens)
        self.buffer = RowBuffer(model.shape)
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []  # job i owns row i of everything below
        self._waited = 0  # iterations since a job first waited
        self._inputs = np.zeros(max_batch, np.int64)  # token to feed next
        self._positions = np.zeros(max_batch, np.int64)  # its position
        self._bases = np.zeros(max_batch, np.uint64)
        self._temperatures = np.ones(max_batch)
        self._top_ps = np.ones(max_batch)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    def clear_cache(self) -> None:
        """Empty the tree. Memory is kept for the next use if it is little, else left to the trainer."""
        self.tree.clear(release=self.tree.pool.bytes > _KEPT_BYTES)
        if not self.active and self.buffer.bytes > _KEPT_BYTES:
            self.buffer.release()

    def reset(self) -> None:
        """Drop everything: after an error no key or value is trusted."""
        self.waiting.clear()
        self.active.clear()
        self.tree.clear()
        self.buffer.release()

    def step(self) -> None:
        """One iteration. Raises whatever the model raises; the caller must then `reset`."""
        with self.model.serving():
            self._drop_abandoned()
            if self._should_admit():
                self._admit()
            if self.active:
                self._decode()

    def _drop_abandoned(self) -> None:
        if any(job.abandoned() for job in self.waiting):
            self.waiting = deque(job for job in self.waiting if not job.abandoned())
        for row in reversed(range(len(self.active))):
            if self.active[row].abandoned():
                self._leave(row)

    def _should_admit(self) -> bool:
        """Whether enough wait: a quarter of the active rows, or the oldest for long enough."""
        if not self.waiting or len(self.active) >= self.max_batch:
            return False
        self._waited += 1
        return self._waited > _PATIENCE or 4 * len(self.waiting) >= len(self.active)

    def _admit(self) -> None:
        """Take waiting jobs in order, compute what is new of their prompts once, and give each a row.

        Everything of a prompt but its last token is put into the tree; the last is the row's first input.
        A group's new tokens are bounded by what the tree may hold, so the memory above that is bounded too.
        """
        self._waited = 0
        group: list[tuple[Job, Node]] = []
        new_tokens = 0
        tree = self.tree
        while self.waiting and len(self.active) + len(group) < self.max_batch:
            prefix = self.waiting[0].prompt[:-1]
            node = tree.match(prefix)
            missing = len(prefix) - node.end
            if group and new_tokens + missing > tree.max_tokens:
                break
            job = self.waiting.popleft()
            again = tree.without_states(node)
            job.cached_tokens = node.end - again
            new_tokens += missing + again
            tree.lock(node)
            tree.evict(missing)
            end = tree.extend(node, prefix, ready=False)
            tree.lock(node, -1)
            tree.lock(end)
            group.append((job, end))
        self.stats.peak_cached_tokens = max(self.stats.peak_cached_tokens, tree.pool.used)
        nodes = pending_nodes([end for _, end in group])
        prefill(self.model, tree.pool, nodes, self.prefill_chunk_tokens)
        self.stats.computed_prefill_tokens += sum(len(node.tokens) for node in nodes)
        longest = max(len(job.prompt) for job, _ in group)
        self.buffer.reserve(len(self.active) + len(group), longest)
        for job, end in group:
            self._enter(job, end)
            tree.lock(end, -1)
            self.stats.prompt_tokens += len(job.prompt)
            self.stats.cached_tokens += job.cached_tokens
        tree.evict()

    def _enter(self, job: Job, end: Node) -> None:
        row = len(self.active)
        if path := end.path():
            self.buffer.load(row, self.tree.pool, self._slots(np.concatenate([node.slots for node in path])))
        if self.model.shape.states:
            self.buffer.load_states(row, end.states or self.model.shape.states)
        self._inputs[row] = job.prompt[-1]
        self._positions[row] = len(job.prompt) - 1
        self._bases[row] = stream_base(job.request.seed, job.request.rollout_key)
        self._temperatures[row] = job.request.sampling.temperature
        self._top_ps[row] = job.request.sampling.top_p
        self.active.append(job)

    def _decode(self) -> None:
        count = len(self.active)
        positions = self._positions[:count]
        self.buffer.reserve(count, int(positions.max()) + 1)
        device = self.model.shape.device
        at = torch.from_numpy(positions).to(device)
        self.buffer.begin_step(at, [job.prompt[:-1] for job in self.active])
        logits = self.model.forward(torch.from_numpy(self._inputs[:count]).to(device), at, self.buffer)
        draws = uniforms(self._bases[:count], positions + 1)
        tokens, logprobs = sample_tokens(logits, self._temperatures[:count], draws, self._top_ps[:count])
        if broken := int(count - np.isfinite(logprobs).sum()):
            raise NonFiniteLogitsError(f"the model gave NaN or infinite logits in {broken} of {count} rows")
        self._inputs[:count] = tokens
        self._positions[:count] += 1
        self.stats.decode_iterations += 1
        self.stats.generated_tokens += count
        now = time.perf_counter()
        finished: list[tuple[int, FinishReason]] = []
        for row, (job, token, logprob) in enumerate(
            zip(self.active, tokens.tolist(), logprobs.tolist(), strict=True)
        ):
            if not job.tokens:
                job.first_token_s = now - job.asked
            job.tokens.append(token)
            job.logprobs.append(logprob)
            watch = job.request.watch
            if token in job.request.sampling.stop_token_ids or (watch is not None and watch(token, logprob)):
                finished.append((row, "stop"))
            elif len(job.tokens) >= job.request.sampling.max_new_tokens:
                finished.append((row, "length"))
        jobs = [(self.active[row], reason) for row, reason in finished]
        for row, _ in reversed(finished):
            self._keep(row)
            self._leave(row)
        for job, reason in jobs:
            self._complete(job, reason)

    def _keep(self, row: int) -> None:
        """Put a row's keys and values into the tree: all its tokens but the last, which was never fed."""
        known = self.active[row].sequence()[:-1]
        node = self.tree.match(known)
        start = node.end
        end = self.tree.extend(node, known, ready=True)
        if end is not node:
            self.buffer.save(row, start, self.tree.pool, self._slots(end.slots))
        if self.model.shape.states and end.states is None and end is not self.tree.root:
            self.tree.keep_states(end, self.buffer.row_states(row))
        self.stats.peak_cached_tokens = max(self.stats.peak_cached_tokens, self.tree.pool.used)
        self.tree.evict()

    def _leave(self, row: int) -> None:
        last = len(self.active) - 1
        if row != last:
            self.buffer.move(last, row, int(self._positions[last]))
            for state in (self._inputs, self._positions, self._bases, self._temperatures, self._top_ps):
                state[row] = state[last]
            self.active[row] = self.active[last]
        self.active.pop()

    def _complete(self, job: Job, reason: FinishReason) -> None:
        self.stats.completions += 1
        self.stats.first_token_s.append(job.first_token_s)
        job.done(
            Completion(
                token_ids=np.array(job.tokens, np.int64),
                logprobs=np.array(job.logprobs, np.float32),
                finish_reason=reason,
                cached_tokens=job.cached_tokens,
                prompt_tokens=len(job.prompt),
                policy_version=self.policy_version,
            )
        )

    def _slots(self, slots: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(slots).to(self.model.shape.device)
