"""A checksum of weights, to tell whether the engine serves what was trained.

The in-process engine: samples from the very module the trainer updates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from transformers import PreTrainedModel

from mosaic_rollout.engine.adapter import CausalModel, DecoderOf
from mosaic_rollout.engine.scheduler import Job, Scheduler
from mosaic_rollout.engine.stats import EngineError, EngineStats, validate_request
from mosaic_rollout.types import Completion, Request


class LocalEngine:
    """Batched sampling with a radix-tree prefix cache, for any Hugging Face causal LM, unmodified.

    Requests of all coroutines are batched: each iteration decodes one token for every active row, then
    yields to the event loop, so that an agent whose completion arrived can ask for its next step and join.
    On one event loop, the same calls in the same order give the same bits.

    The model is not copied. After changing its weights, call `update_weights`; keys and values of the old
    weights would be served otherwise.

    `max_batch` rows are decoded at once; `max_cached_tokens` bounds the tree between iterations; prefill
    runs in forwards of at most `prefill_chunk_tokens` tokens. Sequences end at a request's stop_token_ids
    only: the model's own end-of-sequence id is not consulted. `decoder_of` gives models of known layout a
    forward of fewer operations (`mosaic_fast.policy.StockDecoder.of`); without it modules are called.

        engine = LocalEngine(model)
        request = Request(np.array([5, 9, 2]), SamplingParams(max_new_tokens=8), seed=0, rollout_key=0)
        [completion] = await engine.generate([request])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_batch: int = 128,
        max_cached_tokens: int = 65_536,
        prefill_chunk_tokens: int = 512,
        decoder_of: DecoderOf = lambda model: None,
    ) -> None:
        for name, value in (
            ("max_batch", max_batch),
            ("max_cached_tokens", max_cached_tokens),
            ("prefill_chunk_tokens", prefill_chunk_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._model = CausalModel(model, decoder_of)
        self._scheduler = Scheduler(
            self._model,
            max_batch=max_batch,
            max_cached_tokens=max_cached_tokens,
            prefill_chunk_tokens=prefill_chunk_tokens,
        )
        self._driver: asyncio.Task[None] | None = None
        self._pending: dict[asyncio.Future[Completion], None] = {}  # an ordered set

    @property
    def stats(self) -> EngineStats:
        """Sums since its last reset()."""
        return self._scheduler.stats

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in order.

        Raises ValueError naming the first bad request (nothing is sampled then), EngineError if the model
        failed.
        """
        for index, request in enumerate(requests):
            validate_request(index, request, self._model.vocab_size, self._model.max_tokens)
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        self._claim(loop)
        futures = [self._submit(loop, request) for request in requests]
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive(), name="LocalEngine")
        try:
            return [await future for future in futures]
        finally:
            for future in futures:
                self._pending.pop(future, None)
                if not future.cancel() and not future.cancelled():
                    future.exception()  # retrieved: one error a call is enough

    async def update_weights(self, version: int) -> None:
        """Serve the module's current weights as `version`: nothing computed by the old ones is kept.

        Raises RuntimeError while requests are in flight, since they would mix two policies.
        """
        if self._scheduler.busy:
            raise RuntimeError(
                f"update_weights({version}) with {len(self._pending)} requests in flight: await them first"
            )
        self._scheduler.clear_cache()
        self._scheduler.policy_version = version

    async def flush(self) -> None:
        """Empty the prefix cache; requests in flight go on unharmed."""
        self._scheduler.clear_cache()

    async def release(self) -> None:
        """Empty the prefix cache, which an update would empty too: its memory is the trainer's until then."""
        self._scheduler.clear_cache()

    def close(self) -> None:
        """There is no process to end."""

    def _submit(self, loop: asyncio.AbstractEventLoop, request: Request) -> asyncio.Future[Completion]:
        future: asyncio.Future[Completion] = loop.create_future()
        self._pending[future] = None

        def done(completion: Completion) -> None:
            self._pending.pop(future, None)
            if not future.done():
                future.set_result(completion)

        self._scheduler.waiting.append(Job(request, done, future.done))
        return future

    def _claim(self, loop: asyncio.AbstractEventLoop) -> None:
        """Refuse a second live event loop; forget what a closed one left behind."""
        if self._driver is None or self._driver.done() or self._driver.get_loop() is loop:
            return
        if not self._driver.get_loop().is_closed():
            raise RuntimeError("this LocalEngine is serving another event loop")
        self._driver = None
        self._pending.clear()
        self._scheduler.reset()

    async def _drive(self) -> None:
        """Iterate until no request is left. Whatever stops it early reaches everyone who waits."""
        scheduler = self._scheduler
        self._model.refresh()
        try:
            while scheduler.busy:
                scheduler.step()
                await asyncio.sleep(0)
        except BaseException as error:
            scheduler.reset()
            pending, self._pending = list(self._pending), {}
            for future in pending:
                if not future.done():
                    future.set_exception(self._describe(error))
            if not isinstance(error, Exception):
                raise

    def _describe(self, error: BaseException) -> EngineError:
        kind = type(error) if isinstance(error, EngineError) else EngineError
        detail = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        described = kind(f"sampling failed at policy version {self._scheduler.policy_version}: {detail}")
        described.__cause__ = error
        return described
