"""The server's own counts of cached tokens, against what the forest of the rollouts would allow."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from mosaic_fast.run.metrics import prefix_hit
from mosaic_kernels import pack_forest
from mosaic_rollout.engine.sglang import SGLangEngine
from mosaic_rollout.engine.sglang.ledger import BLOCK
from mosaic_rollout.environments.world import WorldEnvironment
from mosaic_rollout.loop.agent_loop import AgentLoop, Branching, Limits
from mosaic_rollout.types import Rollout, Step, Task, Verdict
from tests.rollout.sglang.serving import embedded_chat, prompt, request, serve

GROUPS, SIBLINGS, STEPS, SAMPLED, OBSERVED = 16, 8, 4, 16, 24


def share_of_ideal(rollouts: list[Rollout]) -> tuple[float, float]:
    """(server's prefix hit / ideal, ideal)."""
    forest = pack_forest([r.token_ids for r in rollouts], [r.trained for r in rollouts])
    figures = prefix_hit(rollouts, forest)
    ideal = figures["tree/engine_prefix_hit_ideal"]
    return figures["tree/engine_prefix_hit"] / ideal, ideal


def test_sixteen_groups_of_eight_over_four_steps_meet_warm_prefixes(engine: SGLangEngine):
    """A system prompt common to all, a task to each group, four turns with observations of their own."""

    async def walk(group: int, key: int) -> Rollout:
        tokens, trained = np.concatenate([prompt(120, 0), prompt(60, 1 + group)]), np.zeros(180, dtype=bool)
        steps, prompted, cached = [], 0, 0
        for number in range(STEPS):
            [done] = await engine.generate([request(tokens, SAMPLED, key=key, group=group)])
            start = len(tokens)
            seen = prompt(OBSERVED, 1000 * key + number)
            tokens = np.concatenate([tokens, done.token_ids, seen])
            trained = np.concatenate([trained, np.ones(len(done.token_ids), bool), np.zeros(OBSERVED, bool)])
            end = start + len(done.token_ids)
            steps.append(Step(start, end, "", None, None, "tool_call", None, None, None, 0, True))
            prompted, cached = prompted + done.prompt_tokens, cached + done.cached_tokens
        return Rollout(
            rollout_id=key,
            group_id=group,
            task=Task(str(group), "benign", "train"),
            token_ids=tokens,
            trained=trained,
            rollout_logprobs=np.zeros(len(tokens), np.float32),
            steps=tuple(steps),
            status="truncated",
            verdict=Verdict(harm=False, done=False, progress=0.0),
            messages=(),
            policy_version=1,
            prompt_tokens=prompted,
            cached_tokens=cached,
        )

    async def all_at_once() -> list[Rollout]:
        return list(await asyncio.gather(*(walk(k // SIBLINGS, k) for k in range(GROUPS * SIBLINGS))))

    engine.stats.reset()
    share, ideal = share_of_ideal(serve(engine, all_at_once))
    assert engine.stats.completions == GROUPS * SIBLINGS * STEPS
    assert ideal > 0.85
    assert share >= 0.97, f"{share:.4f} of the ideal {ideal:.4f}"


@pytest.mark.parametrize("branching", ["independent", "fork_at_check", "fork_at_step"])
def test_the_agent_loop_meets_warm_prefixes(engine: SGLangEngine, branching: Branching):
    """The embedded agent in the embedded world: turns of unequal length, forks, early ends."""
    chat = embedded_chat()
    loop = AgentLoop(engine, chat, WorldEnvironment(), Limits(6, 72, 512))
    tasks = WorldEnvironment().sample("train", 8, 0)
    groups = serve(engine, lambda: loop.groups(tasks, group_size=8, branching=branching, seed=5))
    rollouts = [rollout for group in groups for rollout in group]
    assert all(len(group) == 8 for group in groups)
    assert any(r.parent_id is not None for r in rollouts) == (branching != "independent")
    share, ideal = share_of_ideal(rollouts)
    assert share >= 0.97, f"{share:.4f} of the ideal {ideal:.4f}"
    assert {rollout.policy_version for rollout in rollouts} == {1}


def test_cold_siblings_sent_together_compute_each_prefix_once(engine: SGLangEngine):
    """Four groups of eight, mixed, on open connections: left to arrive at once, most groups compute twice."""
    prompts = [np.concatenate([prompt(100, 5), prompt(880, 77 + key % 4)]) for key in range(32)]

    async def all_at_once() -> list[int]:
        await engine.generate([request(prompt(20, 900 + key), 2, key=key) for key in range(32)])
        done = await engine.generate([request(tokens, 8, key=key) for key, tokens in enumerate(prompts)])
        return [completion.prompt_tokens - completion.cached_tokens for completion in done]

    computed = sum(serve(engine, all_at_once))
    leaders, followers = 980 + 3 * 880, 28  # the last prompt token is always computed
    assert leaders + followers <= computed <= leaders + followers + 3 * BLOCK


def test_siblings_of_a_fork_compute_only_what_differs(engine: SGLangEngine):
    """Eight continuations of a finished rollout's prefix: of each prompt the last token is computed."""
    trunk = prompt(90, 40)

    async def fork() -> list[int]:
        [done] = await engine.generate([request(trunk, 30, key=0)])
        prefix = np.concatenate([trunk, done.token_ids[:17]])
        siblings = await engine.generate([request(prefix, 8, key=k) for k in range(1, 9)])
        return [len(prefix) - sibling.cached_tokens for sibling in siblings]

    assert serve(engine, fork) == [1] * 8
