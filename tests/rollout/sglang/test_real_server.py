"""What a real SGLang server answers, against the trainer's own forward and the in-process engine."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from mosaic_fast.policy import Policy
from mosaic_rollout.engine import EngineError, LocalEngine
from mosaic_rollout.engine.sglang import SGLangEngine
from mosaic_rollout.engine.sglang.weights import Transport, verify_weights
from mosaic_rollout.errors import UserError
from mosaic_rollout.types import Completion, Request
from tests.rollout.sglang.serving import VOCAB, make_engine, prompt, request, serve, trained_logprobs


@pytest.fixture
def changed(policy: Policy, engine: SGLangEngine) -> Iterator[Policy]:
    """A policy with other weights than those served; afterwards the engine serves the shared one again."""
    other = Policy(copy.deepcopy(policy.model))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.07)
    yield other
    serve(engine, engine.health)


def generate(engine: SGLangEngine, asked: list[Request], version: int = 1) -> list[Completion]:
    return serve(engine, lambda: engine.generate(asked), version)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_served_logprobs_are_the_trainers(engine: SGLangEngine, policy: Policy, temperature: float):
    """Cold, warm and forked prompts of odd lengths; a token's log-prob has errors of fp32 rounding only."""
    trunk = prompt(201, 0)
    asked = [request(trunk, key=k, temperature=temperature) for k in range(3)]
    asked += [
        request(trunk[:97], key=7, temperature=temperature),
        request([11], key=8, temperature=temperature),
    ]
    for one, completion in zip(asked, generate(engine, asked), strict=True):
        expected = trained_logprobs(policy, one, completion)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=2e-6, atol=2e-5)
        assert completion.prompt_tokens == len(one.token_ids)


def test_greedy_tokens_are_those_of_the_in_process_engine(engine: SGLangEngine, policy: Policy):
    asked = [request(prompt(60, seed), 20, temperature=0.0, stop=(2,)) for seed in range(4)]
    local = asyncio.run(LocalEngine(policy.model).generate(asked))
    for served, expected in zip(generate(engine, asked), local, strict=True):
        np.testing.assert_array_equal(served.token_ids, expected.token_ids)
        np.testing.assert_allclose(served.logprobs, expected.logprobs, rtol=2e-6, atol=2e-5)


def test_a_stop_token_ends_a_completion_and_is_part_of_it(engine: SGLangEngine):
    [free] = generate(engine, [request(prompt(40, 1), 20)])
    assert (free.finish_reason, len(free.token_ids)) == ("length", 20)
    stop = int(free.token_ids[9])
    first = free.token_ids.tolist().index(stop)
    [stopped] = generate(engine, [request(prompt(40, 1), 20, stop=(stop,))])
    assert stopped.finish_reason == "stop"
    np.testing.assert_array_equal(stopped.token_ids, free.token_ids[: first + 1])


def test_draws_are_keyed_by_seed_and_rollout_not_by_the_batch(engine: SGLangEngine):
    asked = [request(prompt(50, 2), 16, key=key) for key in range(12)]
    together = generate(engine, asked)
    [alone] = generate(engine, [asked[5]])
    np.testing.assert_array_equal(alone.token_ids, together[5].token_ids)
    assert len({tuple(c.token_ids.tolist()) for c in together}) > 6  # siblings differ
    [other_seed] = generate(engine, [request(prompt(50, 2), 16, key=5, seed=1)])
    assert other_seed.token_ids.tolist() != alone.token_ids.tolist()


def test_an_id_outside_the_vocabulary_is_refused_before_it_kills_the_server(engine: SGLangEngine):
    engine.stats.reset()
    with pytest.raises(ValueError, match=f"request 1: token id {VOCAB} is outside"):
        generate(engine, [request(prompt(9, 0)), request([5, VOCAB])])
    with pytest.raises(ValueError, match="more than the 1016"):
        generate(engine, [request(prompt(1010, 0), 7)])
    [longest] = generate(engine, [request(prompt(1010, 0), 6)])
    assert len(longest.token_ids) == 6
    assert engine.stats.restarts == 0


def test_generate_before_the_first_update_says_so(policy: Policy, tmp_path: Path):
    engine = make_engine(policy, tmp_path)
    with pytest.raises(RuntimeError, match="update_weights"):
        asyncio.run(engine.generate([request([5])]))


@pytest.mark.parametrize("transport", get_args(Transport))
def test_an_update_replaces_weights_version_and_cache(
    engine: SGLangEngine, policy: Policy, changed: Policy, tmp_path: Path, transport: Transport
):
    asked = [request(prompt(120, 3), key=1)]
    [before] = generate(engine, asked, version=4)
    assert before.policy_version == 4
    url = engine.lanes[0].url
    other = make_engine(changed, tmp_path, urls=[url], transport=transport)
    [after] = generate(other, asked, version=5)
    assert after.cached_tokens == 0  # keys of the old weights are gone
    assert after.policy_version == 5
    np.testing.assert_allclose(
        after.logprobs, trained_logprobs(changed, asked[0], after), rtol=2e-6, atol=2e-5
    )
    assert np.abs(after.logprobs - trained_logprobs(policy, asked[0], after)).max() > 0.01


@pytest.mark.parametrize("transport", get_args(Transport))
def test_checksums_prove_that_served_is_trained(
    engine: SGLangEngine, changed: Policy, tmp_path: Path, transport: Transport
):
    """The proof holds after an update, and fails for a server that was left with other weights."""
    url = engine.lanes[0].url
    other = make_engine(changed, tmp_path, urls=[url], transport=transport)
    folder = tmp_path / "trained"
    changed.save_pretrained(folder)

    async def verify() -> None:
        await verify_weights(other.lanes[0].client, folder, 2, 60.0)

    serve(other, verify, version=2)
    with torch.no_grad():
        list(changed.model.parameters())[3].view(-1)[0] += 1e-6  # served, but not what is in the folder
    with pytest.raises(EngineError, match=r"1 of .* tensors differ"):
        serve(other, verify, version=2)


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_a_session_that_a_killed_trainer_left_open_is_closed(
    engine: SGLangEngine, policy: Policy, tmp_path: Path, transport: Transport
):
    other = make_engine(policy, tmp_path, urls=[engine.lanes[0].url], transport=transport)

    async def leave_open() -> None:
        await other.lanes[0].client.call("/begin_weight_update", {}, timeout_s=10.0)

    serve(other, leave_open, version=2)
    assert serve(other, other.health, version=3) == [""]
    other.close()


def test_a_group_that_the_server_has_lost_is_formed_anew(
    engine: SGLangEngine, policy: Policy, tmp_path: Path
):
    """As after a restart of another's server: the broadcast has no receiver and must not wait for one."""
    other = make_engine(policy, tmp_path, urls=[engine.lanes[0].url], transport="distributed")
    [lane] = other.lanes

    async def forget() -> str:
        name = other._groups[lane].name
        await lane.client.call("/destroy_weights_update_group", {"group_name": name}, timeout_s=10.0)
        return name

    async def served() -> tuple[str, str]:
        return await lane.client.weight_version(10.0), other._groups[lane].name

    lost = serve(other, forget, version=2)
    version, name = serve(other, served, version=3)
    assert version == "3"
    assert name != lost
    other.close()


def test_a_colocated_server_gives_its_memory_back_and_serves_again(
    engine: SGLangEngine, policy: Policy, tmp_path: Path
):
    """The order of calls; on a CPU they free nothing."""
    other = make_engine(policy, tmp_path, urls=[engine.lanes[0].url], colocated=True)
    asked = [request(prompt(30, 5), key=2)]
    [first] = generate(other, asked)
    [again] = generate(other, asked, version=2)
    np.testing.assert_array_equal(first.token_ids, again.token_ids)
    assert again.cached_tokens == 0


def test_a_group_goes_to_one_server_and_groups_are_spread(
    engine: SGLangEngine, policy: Policy, tmp_path: Path
):
    """Two lanes, here to one server by two names: each has asked for the prompts of its groups alone."""
    url = engine.lanes[0].url
    other = make_engine(policy, tmp_path, urls=[url, url.replace("127.0.0.1", "localhost")])
    asked = [
        request(prompt(40, group), 4, key=key, group=group) for key, group in enumerate([0, 1, 2, 3] * 2)
    ]

    async def known() -> list[list[int]]:
        await other.generate(asked)
        new_tokens = []
        for lane in other.lanes:
            flights = [await lane.ledger.admit(prompt(40, group)) for group in range(4)]
            new_tokens.append([flight.new_tokens for flight in flights])
        return new_tokens

    assert serve(other, known) == [[1, 40, 1, 40], [40, 1, 40, 1]]
    assert other.stats.completions == len(asked)


def test_a_wrong_address_and_a_missing_python_are_named(policy: Policy, tmp_path: Path):
    nobody = make_engine(policy, tmp_path, urls=["http://127.0.0.1:9"])
    with pytest.raises(UserError, match=r"engine\.urls: http://127\.0\.0\.1:9 cannot be reached"):
        generate(nobody, [request([5])])
    with pytest.raises(UserError, match=r"engine\.python: there is no .*make sglang"):
        make_engine(policy, tmp_path, python=tmp_path / "python")
