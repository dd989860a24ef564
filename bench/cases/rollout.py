"""rollout: tokens sampled a second by the engines, against transformers.generate (padded batch).

    rollout            a training step's agents in the embedded world: 16 tasks, 4 rollouts each, several
                       turns; siblings share the prompt, a turn's prompt repeats all turns before it
    rollout:forked     the same with rollouts that fork at a check: siblings also share their first turns
    rollout:groups     16 groups of 8 agents, 4 turns of 16 tokens each, an observation of 24 tokens after
                       each; a system prompt of 120 tokens in common, a task of 60 to each group
    rollout:groups-small  the same with 8 groups of 4 agents
    rollout:flat       64 prompts that share nothing, one turn of equal length

An agent's next prompt is known only when its last turn is. Ours (`local`, in process) serves each agent as it
comes. The stock way is given every advantage of batching: turn k of all agents is one left-padded batch,
sampled until its longest completion is there, with the same temperature, and without the log-probs that ours
returns. In rollout and rollout:forked the agents' prompts are those of a recorded step; in the others they
consist of what has been sampled, and a real SGLang server plays them, too, where `make sglang` has put one.

ideal = positions that generate forwards / positions that must be forwarded (each distinct (prefix, token)
once), both without padding: what sharing alone allows. Continuous batching can pass it.

Beside the timings a second table has, of each engine: tokens a second, prefix hits (prompt tokens not
computed / prompt tokens), the ideal of that (each distinct (prefix, token) of the prompts computed once), and
the time from asking to the first token, waiting included, median and 95th percentile of one round.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from agreement import Missing
from device import Place
from measure import Result, compare
from serving import Round, Turn, print_serving, served, sglang_engine
from transformers import PreTrainedModel, Qwen3ForCausalLM

from mosaic_fast.config import Config
from mosaic_fast.policy import StockDecoder
from mosaic_fast.setup.build import Setup, build_setup
from mosaic_fast.setup.model_folder import model_folder
from mosaic_kernels import pack_forest
from mosaic_rollout.engine import LocalEngine
from mosaic_rollout.loop.agent_loop import Branching
from mosaic_rollout.types import Completion, Engine, ManagedEngine, Request, SamplingParams

FORMULA = "ideal = positions that generate forwards / distinct (prefix, token), each forwarded once"


@dataclass(frozen=True)
class Agent:
    """Turns to play: the first request, how many tokens each turn samples, and what comes between turns."""

    first: Request
    counts: list[int]
    between: list[np.ndarray]  # [len(counts) - 1] of token ids
    recorded: bool = False  # `between` are whole prompts; else they are appended to what was sampled

    def next_prompt(self, turn: int, prompt: np.ndarray, sampled: np.ndarray) -> np.ndarray:
        """The prompt [L] int64 of turn `turn`, after the one before it."""
        added = self.between[turn - 1]
        return added if self.recorded else np.concatenate([prompt, sampled, added])


@dataclass(frozen=True)
class Workload:
    model: PreTrainedModel
    agents: list[Agent]

    @property
    def generated_tokens(self) -> int:
        return sum(sum(agent.counts) for agent in self.agents)


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


def _embedded() -> Setup:
    return build_setup(Config(), model_folder("embedded"))


def _recorded(branching: Branching, tasks: int) -> Workload:
    """The turns of one training step, as the embedded model plays them."""
    parts = _embedded()
    recorder = _Recorder(parts.engine)
    loop = replace(parts.loop, engine=recorder)
    asyncio.run(
        loop.groups(loop.environment.sample("train", tasks, 7), group_size=4, branching=branching, seed=3)
    )
    agents = []
    for key in sorted(recorder.turns):
        requests = [request for request, _ in recorder.turns[key]]
        counts = [count for _, count in recorder.turns[key]]
        agents.append(Agent(requests[0], counts, [r.token_ids for r in requests[1:]], recorded=True))
    return Workload(parts.policy.model, agents)


def _groups(groups: int, siblings: int) -> Workload:
    model = _embedded().policy.model
    rng = np.random.default_rng(0)

    def random(length: int) -> np.ndarray:
        return rng.integers(10, model.config.vocab_size, size=length)  # the first few ids are special

    system, tasks, agents = random(120), [random(60) for _ in range(groups)], []
    for key in range(groups * siblings):
        prompt = np.concatenate([system, tasks[key // siblings]])
        first = Request(prompt, SamplingParams(16), 0, key, key // siblings)
        agents.append(Agent(first, [16] * 4, [random(24) for _ in range(3)]))
    return Workload(model, agents)


def _flat(prompts: int) -> Workload:
    model = _embedded().policy.model
    rng = np.random.default_rng(0)
    agents = []
    for key in range(prompts):
        prompt = rng.integers(10, model.config.vocab_size, size=128)
        agents.append(Agent(Request(prompt, SamplingParams(48), 0, key, key), [48], []))
    return Workload(model, agents)


async def _play(engine: Engine, agent: Agent, *, stop: bool) -> list[Turn]:
    """All turns of an agent, each asked for when the last is done."""
    turns: list[Turn] = []
    prompt = agent.first.token_ids
    for number, count in enumerate(agent.counts):
        if turns:
            prompt = agent.next_prompt(number, prompt, turns[-1].completion.token_ids)
        ends = agent.first.sampling.stop_token_ids if stop else ()
        sampling = SamplingParams(count, agent.first.sampling.temperature, ends)
        [completion] = await engine.generate([replace(agent.first, token_ids=prompt, sampling=sampling)])
        turns.append(Turn(prompt, completion))
    return turns


class _Local:
    """All agents at once in the in-process engine, whose cache starts empty."""

    def __init__(self, workload: Workload, *, stop: bool = False) -> None:
        self._workload, self._stop = workload, stop
        self._engine = LocalEngine(
            workload.model, max_batch=128, max_cached_tokens=200_000, decoder_of=StockDecoder.of
        )
        self.rounds: list[Round] = []
        self.turns: list[list[Turn]] = []

    def __call__(self) -> float:
        self._engine.stats.reset()

        async def step() -> list[list[Turn]]:
            await self._engine.update_weights(0)
            plays = (_play(self._engine, agent, stop=self._stop) for agent in self._workload.agents)
            return list(await asyncio.gather(*plays))

        with Round.timed(self.rounds) as timed:
            self.turns = asyncio.run(step())
        timed.served = served(self.turns, self._engine.stats.first_token_s)
        return timed.seconds


class _Sglang:
    """All agents at once on the server; before the clock runs, an update empties its cache."""

    def __init__(self, workload: Workload, engine: ManagedEngine, first_token_s: deque[float]) -> None:
        self._workload, self._engine, self._first_token_s = workload, engine, first_token_s
        self.rounds: list[Round] = []
        self.turns: list[list[Turn]] = []

    def __call__(self) -> float:
        self._first_token_s.clear()

        async def step() -> list[list[Turn]]:
            await self._engine.update_weights(len(self.rounds))
            try:
                with Round.timed(self.rounds):
                    plays = (_play(self._engine, agent, stop=False) for agent in self._workload.agents)
                    return list(await asyncio.gather(*plays))
            finally:
                await self._engine.release()

        self.turns = asyncio.run(step())
        self.rounds[-1].served = served(self.turns, self._first_token_s)
        return self.rounds[-1].seconds


class _Stock:
    """transformers.generate, a left-padded batch a turn."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self.rounds: list[Round] = []

    def __call__(self) -> float:
        model = self._workload.model
        assert isinstance(model, Qwen3ForCausalLM)
        model.eval()
        model.set_attn_implementation("sdpa")
        with Round.timed(self.rounds) as timed:
            live = [(agent, agent.first.token_ids) for agent in self._workload.agents]
            turn = 0
            while live:
                sampled = self._sample(model, [p for _, p in live], max(a.counts[turn] for a, _ in live))
                turn += 1
                live = [
                    (agent, agent.next_prompt(turn, prompt, tokens))
                    for (agent, prompt), tokens in zip(live, sampled, strict=True)
                    if turn < len(agent.counts)
                ]
        timed.generated_tokens = self._workload.generated_tokens  # what was sampled beyond is of no use
        return timed.seconds

    @staticmethod
    def _sample(model: Qwen3ForCausalLM, prompts: list[np.ndarray], count: int) -> np.ndarray:
        """`count` tokens after each prompt, [B, count]."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            # pyrefly: ignore [bad-argument-type]  (transformers annotates its own models too narrowly)
            out = model.generate(
                ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=count, min_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out[:, longest:].numpy()


def _work_ratio(turns: list[list[Turn]]) -> float:
    """Positions forwarded: every prompt and completion of every turn / each distinct one once."""
    stock = sum(len(t.prompt) + len(t.completion.token_ids) - 1 for agent in turns for t in agent)
    unique = pack_forest([turn.prompt for agent in turns for turn in agent]).num_nodes
    last = sum(len(agent[-1].completion.token_ids) - 1 for agent in turns)  # the next prompt has the others
    return stock / (unique + last)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "rollout": lambda: _recorded("independent", 16),
    "rollout:forked": lambda: _recorded("fork_at_check", 16),
    "rollout:groups": lambda: _groups(16, 8),
    "rollout:groups-small": lambda: _groups(8, 4),
    "rollout:flat": lambda: _flat(64),
}
VARIANTS, QUICK = tuple(WORKLOADS), ("rollout",)
DEFAULT = ("rollout", "rollout:groups-small")
ON_CPU = True
SECONDS = {"rollout": 16, "rollout:forked": 20, "rollout:groups-small": 13}  # SGLang takes a minute more
SECONDS |= {"rollout:groups": 180, "rollout:flat": 60}
_RECORDED = ("rollout", "rollout:forked")


def check(name: str, quick: bool, place: Place) -> Missing:
    """Played again from the record, every turn has the length it had, and the model's own log-probs."""
    recorded = name in _RECORDED
    workload = _recorded("independent", 4) if recorded else _groups(2, 3)
    ours = _Local(workload, stop=recorded)
    ours()
    for agent, turns in zip(workload.agents, ours.turns, strict=True):
        found = [len(turn.completion.token_ids) for turn in turns]
        assert found == agent.counts, f"{found} tokens, expected {agent.counts}"
    _check_logprobs("local", workload.model, ours.turns, 1e-5)
    return {}


def _check_logprobs(engine: str, model: PreTrainedModel, turns: list[list[Turn]], limit: float) -> None:
    for turn in (turn for agent in turns for turn in agent):
        count = len(turn.completion.token_ids)
        ids = torch.from_numpy(np.concatenate([turn.prompt, turn.completion.token_ids]))[None]
        with torch.inference_mode():
            logits = model.eval()(ids, logits_to_keep=count + 1).logits[0, :-1]
        own = torch.log_softmax(logits, -1).gather(1, ids[0, -count:, None])[:, 0].numpy()
        error = float(np.abs(own - turn.completion.logprobs).max())
        assert error < limit, f"{engine}: log-probs are off by {error:.1e}"


@contextmanager
def _server(name: str, workload: Workload) -> Iterator[_Sglang | str]:
    """The workload on a real SGLang server whose log-probs have been checked, or why there is none."""
    if name in _RECORDED:
        yield "not run: a recorded step has what the in-process engine sampled; see rollout:groups"
        return
    with sglang_engine() as found:
        if isinstance(found, str):
            yield found
            return
        sglang = _Sglang(workload, found, found.stats.first_token_s)
        sglang()
        _check_logprobs("sglang", workload.model, sglang.turns[:16], 2e-5)
        sglang.rounds.clear()
        yield sglang


def run(name: str, quick: bool, place: Place, missing: Missing) -> Result:
    workload = WORKLOADS[name]()
    local, stock = _Local(workload), _Stock(workload)
    local()
    turns = local.turns
    prompts = [turn.prompt for agent in turns for turn in agent]
    contenders: dict[str, Callable[[], object]] = {"ours": local, "flat": stock}
    with _server(name, workload) as sglang:
        if not isinstance(sglang, str):
            contenders["sglang"] = sglang
        result = compare(
            contenders,
            repeats=3 if quick else 5,
            budget_s=30.0,
            ideal=_work_ratio(turns),
            extra={
                "raw_tokens": float(sum(map(len, prompts))),
                "unique_tokens": float(pack_forest(prompts).num_nodes),
                "generated_tokens": float(workload.generated_tokens),
            },
        )
    rows = {
        "local": local.rounds[2:],  # the first ones warmed up
        "transformers.generate": stock.rounds[1:],
        "sglang": sglang if isinstance(sglang, str) else sglang.rounds[1:],
    }
    print_serving(name, rows)
    result.extra["generated_tokens_per_s"] = workload.generated_tokens / result.median_s
    result.extra["flat_generated_tokens_per_s"] = workload.generated_tokens / result.flat_median_s
    for engine, rounds in rows.items():
        if not isinstance(rounds, str) and engine != "transformers.generate":
            result.extra.update(rounds[-1].figures(engine))
    return result
