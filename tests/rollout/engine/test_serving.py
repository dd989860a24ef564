"""Callers: limits, refusals, concurrency, failures; and the trainer's model left as it was."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from mosaic_rollout.engine import EngineError, NonFiniteLogitsError
from mosaic_rollout.engine.adapter import ATTENTION_NAME
from mosaic_rollout.types import Completion, Request, SamplingParams
from tests.rollout.engine.helpers import (
    VOCAB,
    generate,
    local_engine,
    naive_sample,
    random_tokens,
    request,
    tiny_model,
    tokens_held,
)

PROMPT = random_tokens(6, 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request([]), "empty prompt"),
        (request([1, VOCAB]), f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        (request([-1, 1]), "token id -1"),
        (request([1], 0), "max_new_tokens must be at least 1"),
        (request([1] * 250, 7), "257, more than the 256 of max_position_embeddings"),
        (request([1], temperature=-0.5), "temperature"),
        (request([1], temperature=float("nan")), "temperature"),
        (request([1], key=-1), "rollout_key"),
        (Request(np.array([1.0]), SamplingParams(1), 0, 0), "integer"),
        (Request(np.array([[1]]), SamplingParams(1), 0, 0), "1-D"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_request_is_refused_by_name_before_anything_is_sampled(bad: Request, message: str) -> None:
    engine = local_engine(tiny_model())
    with pytest.raises(ValueError, match="request 1:") as error:
        generate(engine, [request(PROMPT), bad])
    assert message in str(error.value)
    assert engine.stats.prompt_tokens == 0


def test_options_are_refused_by_name() -> None:
    for name in ("max_batch", "max_cached_tokens", "prefill_chunk_tokens"):
        with pytest.raises(ValueError, match=name):
            local_engine(tiny_model(), **{name: 0})


def test_longrope_stops_where_its_frequencies_would_change() -> None:
    with pytest.raises(ValueError, match="more than the 64"):
        generate(local_engine(tiny_model("phi3_longrope")), [request(PROMPT, 59)])


def test_other_kinds_of_attention_are_refused_by_name() -> None:
    model = tiny_model()
    model.config.layer_types = ["full_attention", "minimax_m3_sparse", "full_attention"]
    with pytest.raises(ValueError, match="minimax_m3_sparse"):
        local_engine(model)


def test_no_requests_no_completions() -> None:
    assert generate(local_engine(tiny_model()), []) == []


def test_stop_tokens_are_included_and_length_is_a_limit() -> None:
    engine = local_engine(tiny_model())
    [free] = generate(engine, [request(PROMPT, 20)])
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)
    stop = int(free.token_ids[7])
    first = free.token_ids.tolist().index(stop)
    [stopped] = generate(engine, [request(PROMPT, 20, stop=(stop,))])
    assert stopped.finish_reason == "stop"
    np.testing.assert_array_equal(stopped.token_ids, free.token_ids[: first + 1])
    [at_limit] = generate(engine, [request(PROMPT, first + 1, stop=(stop,))])
    assert at_limit.finish_reason == "stop"  # a stop token that is also the last allowed one
    [one] = generate(engine, [request([3], 1)])
    assert len(one.token_ids) == len(one.logprobs) == 1


def test_the_whole_context_can_be_used() -> None:
    model = tiny_model()
    asked = request(random_tokens(250, 0), 6)
    [completion] = generate(local_engine(model), [asked])
    assert completion.token_ids.tolist() == naive_sample(model, asked)


def test_completions_have_the_contracts_types() -> None:
    [completion] = generate(local_engine(tiny_model()), [request(PROMPT, 4)])
    assert completion.token_ids.dtype == np.int64
    assert completion.logprobs.dtype == np.float32
    assert (completion.prompt_tokens, completion.cached_tokens, completion.policy_version) == (6, 0, 0)


def test_concurrent_callers_share_iterations() -> None:
    engine = local_engine(tiny_model())

    async def agents() -> list[list[Completion]]:
        return await asyncio.gather(*[engine.generate([request(PROMPT, 10, key=key)]) for key in range(9)])

    together = asyncio.run(agents())
    assert engine.stats.decode_iterations == 10
    for key, [completion] in enumerate(together):
        [alone] = generate(engine, [request(PROMPT, 10, key=key)])
        np.testing.assert_array_equal(completion.token_ids, alone.token_ids)


def test_a_finished_agents_next_step_joins_the_running_batch() -> None:
    engine = local_engine(tiny_model())

    async def agent(steps: int, new: int) -> None:
        tokens = PROMPT
        for _ in range(steps):
            [completion] = await engine.generate([request(tokens, new)])
            tokens = np.concatenate([tokens, completion.token_ids])

    async def both() -> None:
        await asyncio.gather(agent(1, 12), agent(3, 4))

    asyncio.run(both())
    assert engine.stats.decode_iterations == 12  # not 12 + 12, and not a gap between the short one's steps


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("weight")])
def test_a_failure_reaches_every_caller_and_the_engine_recovers(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model = tiny_model()
    engine = local_engine(model, max_batch=2)  # two callers active, two waiting
    [expected] = generate(engine, [request(PROMPT, 8)])
    calls = 0

    def fail(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error

    handle = model.register_forward_pre_hook(fail)

    async def agents() -> list[list[Completion] | BaseException]:
        asked = [engine.generate([request(PROMPT, 8, key=key)] * 2) for key in range(4)]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=600)

    outcomes = asyncio.run(agents())
    handle.remove()
    assert len(outcomes) == 4
    for outcome in outcomes:
        assert isinstance(outcome, EngineError)
        assert type(error).__name__ in str(outcome)
        assert outcome.__cause__ is error
    [again] = generate(engine, [request(PROMPT, 8)])
    assert again.cached_tokens == 0  # nothing of the failed run is trusted
    np.testing.assert_array_equal(again.token_ids, expected.token_ids)
    assert model.training


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_non_finite_weights_are_named_with_their_version(broken: float) -> None:
    model = tiny_model()
    engine = local_engine(model)
    asyncio.run(engine.update_weights(41))
    norm = model.model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm[0] = broken
    with pytest.raises(NonFiniteLogitsError, match="policy version 41"):
        generate(engine, [request(PROMPT, 4), request(PROMPT, 4, key=1)])
    with torch.no_grad():
        norm.copy_(kept)
    asked = request(PROMPT, 4)
    assert generate(engine, [asked])[0].token_ids.tolist() == naive_sample(model, asked)


def test_the_rows_of_a_caller_who_leaves_are_filled_by_others() -> None:
    model = tiny_model()
    engine = local_engine(model)

    async def agents() -> Completion:
        leaves = asyncio.create_task(engine.generate([request(PROMPT, 200, key=5)]))
        other = asyncio.create_task(engine.generate([request(PROMPT, 15, key=6)]))
        for _ in range(5):
            await asyncio.sleep(0)
        leaves.cancel()
        return (await other)[0]

    completion = asyncio.run(agents())
    assert completion.token_ids.tolist() == naive_sample(model, request(PROMPT, 15, key=6))


def test_a_cancelled_caller_leaves_and_the_others_go_on() -> None:
    engine = local_engine(tiny_model(), max_batch=3)

    async def agents() -> tuple[list[Completion], int]:
        others = [asyncio.create_task(engine.generate([request(PROMPT, 15, key=key)])) for key in range(2)]
        cancelled = asyncio.create_task(engine.generate([request(PROMPT, 200, key=key) for key in (5, 6)]))
        for _ in range(5):
            await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        completions = [(await other)[0] for other in others]
        return completions, engine.stats.decode_iterations

    completions, iterations = asyncio.run(agents())
    assert iterations == 15
    for key, completion in enumerate(completions):
        [alone] = generate(engine, [request(PROMPT, 15, key=key)])
        np.testing.assert_array_equal(completion.token_ids, alone.token_ids)


def test_an_abandoned_event_loop_leaves_nothing_behind() -> None:
    engine = local_engine(tiny_model())

    async def walk_away() -> None:
        asyncio.create_task(engine.generate([request(PROMPT, 200)]))  # noqa: RUF006
        for _ in range(3):
            await asyncio.sleep(0)

    asyncio.run(walk_away())
    asyncio.run(engine.update_weights(1))
    [completion] = generate(engine, [request(PROMPT, 5)])
    assert len(completion.token_ids) == 5


def test_the_drivers_cancellation_reaches_its_callers() -> None:
    engine = local_engine(tiny_model())

    async def cancel_driver() -> None:
        running = asyncio.create_task(engine.generate([request(PROMPT, 200)]))
        for _ in range(3):
            await asyncio.sleep(0)
        assert engine._driver is not None
        engine._driver.cancel()
        with pytest.raises(EngineError, match="CancelledError"):
            await asyncio.wait_for(running, timeout=600)

    asyncio.run(cancel_driver())
    assert len(generate(engine, [request(PROMPT, 5)])) == 1


def test_the_trainers_model_is_left_as_found() -> None:
    model = tiny_model()
    model.config._attn_implementation = "eager"
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    parameters = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    seen: set[tuple[str, bool, bool]] = set()
    hook = model.register_forward_pre_hook(
        lambda m, _: seen.add((m.config._attn_implementation, m.training, torch.is_grad_enabled()))
    )
    engine = local_engine(model)
    generate(engine, [request(PROMPT, 4)])
    hook.remove()
    assert seen == {(ATTENTION_NAME, False, False)}
    assert model.config._attn_implementation == "eager"
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert (id(parameter), True) == (parameters[name][0], torch.equal(parameter, parameters[name][1]))
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_statistics_add_up_and_reset() -> None:
    engine = local_engine(tiny_model())
    generate(engine, [request(PROMPT, new, key=new) for new in (1, 3, 5)])
    stats = engine.stats
    assert (stats.completions, stats.generated_tokens, stats.decode_iterations) == (3, 9, 5)
    assert stats.peak_cached_tokens == tokens_held(engine) > 0
    stats.reset()
    assert stats.generated_tokens == stats.prompt_tokens == 0


def test_a_watch_sees_every_token_and_may_end_the_completion() -> None:
    engine, seen = local_engine(tiny_model()), list[tuple[int, float]]()

    def watch(token: int, logprob: float) -> bool:
        seen.append((token, logprob))
        return len(seen) == 3

    asked = request(random_tokens(5, seed=0), 6)
    [whole, ended] = generate(engine, [asked, replace(asked, watch=watch)])
    assert ended.finish_reason == "stop"
    assert ended.token_ids.tolist() == whole.token_ids[:3].tolist() == [token for token, _ in seen]
    assert ended.logprobs.tolist() == [np.float32(logprob) for _, logprob in seen]


def test_rows_keep_their_own_top_p_as_others_leave() -> None:
    asked = [
        replace(one, sampling=replace(one.sampling, top_p=top_p))
        for one, top_p in (
            (request(random_tokens(4, seed=n), 1 + 2 * n, key=n), 1.0 - 0.19 * n) for n in range(5)
        )
    ]
    together = generate(local_engine(tiny_model()), asked)
    for one, alone in zip(together, asked, strict=True):
        assert one.token_ids.tolist() == generate(local_engine(tiny_model()), [alone])[0].token_ids.tolist()
