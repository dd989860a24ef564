"""rollout: tokens sampled a second by the in-process engine, against transformers.generate (padded batch).

    rollout            a training step's agents in the embedded world: 16 tasks, 4 rollouts each, several
                       turns; siblings share the prompt, a turn's prompt repeats all turns before it
    rollout:forked     the same with rollouts that fork at a check: siblings also share their first turns
    rollout:flat       64 prompts that share nothing, one turn of equal length

An agent's next prompt is known only when its last turn is. Ours serves each agent as it comes. The stock
way is given every advantage of batching: turn k of all agents is one left-padded batch, sampled until its
longest completion is there, with the same temperature, and without the log-probs that ours returns.

ideal = positions that generate forwards / positions that must be forwarded (each distinct (prefix, token)
once), both without padding: what sharing alone allows. Continuous batching can pass it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from measure import Result, compare
from transformers import PreTrainedModel, Qwen3ForCausalLM

from mosaic_fast.components import Components, build_components, model_folder
from mosaic_fast.config import Config
from mosaic_kernels import pack_forest
from mosaic_rollout.branching import Branching
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.types import Completion, Engine, Request, SamplingParams


@dataclass(frozen=True)
class Workload:
    """Turns of agents: agent a asks for turns[a][0], and for each next one when the last is done."""

    model: PreTrainedModel
    turns: list[list[tuple[Request, int]]]  # a request and how many tokens it is to sample

    @property
    def generated_tokens(self) -> int:
        return sum(count for agent in self.turns for _, count in agent)

    @property
    def rounds(self) -> list[list[tuple[Request, int]]]:
        """Turn k of all agents that have one: the stock way's batches."""
        depth = max(map(len, self.turns))
        return [[agent[k] for agent in self.turns if k < len(agent)] for k in range(depth)]


class _Recorder:
    """An engine that remembers what it was asked and how long its answers were."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.turns: dict[int, list[tuple[Request, int]]] = {}

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        completions = await self._engine.generate(requests)
        for request, completion in zip(requests, completions, strict=True):
            turn = (request, len(completion.token_ids))
            self.turns.setdefault(request.rollout_key, []).append(turn)
        return completions

    async def update_weights(self, version: int) -> None:
        await self._engine.update_weights(version)

    async def flush(self) -> None:
        await self._engine.flush()


def _embedded() -> Components:
    return build_components(Config(), model_folder("embedded"))


def _agents(branching: Branching, tasks: int) -> Workload:
    """The turns of one training step, as the embedded model plays them."""
    parts = _embedded()
    recorder = _Recorder(parts.engine)
    loop = replace(parts.loop, engine=recorder)
    asyncio.run(
        loop.groups(loop.environment.sample("train", tasks, 7), group_size=4, branching=branching, seed=3)
    )
    return Workload(parts.policy.model, [recorder.turns[key] for key in sorted(recorder.turns)])


def _flat(prompts: int) -> Workload:
    model = _embedded().policy.model
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_new_tokens=48)
    return Workload(
        model,
        [
            [(Request(rng.integers(model.config.vocab_size, size=128), sampling, 0, key), 48)]
            for key in range(prompts)
        ],
    )


def _ours(workload: Workload, stop: bool = False) -> Callable[[], list[Completion]]:
    """All agents at once; each asks for its next turn when the last is done. The cache starts empty."""
    engine = LocalEngine(workload.model, max_batch=96, max_cached_tokens=200_000)

    async def play(turns: list[tuple[Request, int]]) -> list[Completion]:
        played = []
        for request, count in turns:
            sampling = SamplingParams(
                count, request.sampling.temperature, request.sampling.stop_token_ids if stop else ()
            )
            played += await engine.generate([replace(request, sampling=sampling)])
        return played

    async def step() -> list[Completion]:
        await engine.update_weights(0)
        return [c for agent in await asyncio.gather(*map(play, workload.turns)) for c in agent]

    return lambda: asyncio.run(step())


def _stock(workload: Workload) -> Callable[[], int]:
    """transformers.generate, a left-padded batch a turn; returns the tokens it sampled, surplus included."""
    model = workload.model
    assert isinstance(model, Qwen3ForCausalLM)

    def step() -> int:
        sampled = 0
        model.eval()
        model.set_attn_implementation("sdpa")
        for batch in workload.rounds:
            longest = max(len(request.token_ids) for request, _ in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (request, _) in enumerate(batch):
                ids[row, longest - len(request.token_ids) :] = torch.from_numpy(request.token_ids)
                mask[row, longest - len(request.token_ids) :] = 1
            count = max(count for _, count in batch)
            with torch.inference_mode():
                # pyrefly: ignore [bad-argument-type]  (transformers annotates its own models too narrowly)
                model.generate(
                    ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
                )  # fmt: skip
            sampled += count * len(batch)
        return sampled

    return step


def _work_ratio(workload: Workload) -> float:
    """Positions forwarded: every prompt and completion of every turn / each distinct one once."""
    turns = [turn for agent in workload.turns for turn in agent]
    stock = sum(len(request.token_ids) + count - 1 for request, count in turns)
    unique = pack_forest([request.token_ids for request, _ in turns]).num_nodes
    last = sum(agent[-1][1] - 1 for agent in workload.turns)  # of earlier turns the next prompt has them
    return stock / (unique + last)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "rollout": lambda: _agents("independent", 16),
    "rollout:forked": lambda: _agents("fork_at_check", 16),
    "rollout:flat": lambda: _flat(64),
}
VARIANTS, QUICK = tuple(WORKLOADS), ("rollout",)


def check(name: str, quick: bool) -> None:
    """Played again from the record, every turn has the length it had, and the model's own log-probs."""
    workload = _agents("independent", 4)
    played = iter(_ours(workload, stop=True)())
    model = workload.model.eval()
    for request, count in (turn for agent in workload.turns for turn in agent):
        completion = next(played)
        assert len(completion.token_ids) == count, f"{len(completion.token_ids)} tokens, recorded {count}"
        ids = torch.from_numpy(np.concatenate([request.token_ids, completion.token_ids]))[None]
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=count + 1).logits[0, :-1]
        own = torch.log_softmax(logits, -1).gather(1, ids[0, -count:, None])[:, 0].numpy()
        error = float(np.abs(own - completion.logprobs).max())
        assert error < 1e-5, f"log-probs are off by {error:.1e}"


def run(name: str, quick: bool) -> Result:
    workload = WORKLOADS[name]()
    prompts = [request.token_ids for agent in workload.turns for request, _ in agent]
    result = compare(
        {"ours": _ours(workload), "flat": _stock(workload)},
        repeats=3 if quick else 5,
        ideal=_work_ratio(workload),
        extra={
            "raw_tokens": float(sum(map(len, prompts))),
            "unique_tokens": float(pack_forest(prompts).num_nodes),
            "generated_tokens": float(workload.generated_tokens),
        },
    )
    result.extra["generated_tokens_per_s"] = workload.generated_tokens / result.median_s
    result.extra["flat_generated_tokens_per_s"] = workload.generated_tokens / result.flat_median_s
    return result
