"""Segments of a forest, and recurrent layers that run on them."""

from __future__ import annotations

from functools import wraps
from inspect import signature

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from mosaic_fast.errors import UserError
from mosaic_fast.learner.execution.schedule import hold
from mosaic_fast.policy import Policy
from mosaic_fast.policy.forest_tensors import forest_tensors
from mosaic_kernels import pack_forest
from mosaic_rollout.engine.recurrent import recurrent_modules
from mosaic_rollout.engine.segments import Segments
from tests.families.families import VOCAB, config_of, model_of, wholly_fp64
from tests.families.test_forests import PLANS, _compare
from tests.policy.policy_helpers import Rollouts, rollouts

CPU = torch.device("cpu")


def long_rollouts() -> Rollouts:
    """Segments of one token, of about a chunk of 64, and of more than two, on three levels."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, VOCAB, 150)
    sequences = [trunk]
    for at, more in ((70, 64), (70, 1), (71, 63), (148, 3), (150, 130)):
        sequences.append(np.concatenate([trunk[:at], rng.integers(0, VOCAB, more)]))
    return Rollouts(sequences, [np.arange(len(one)) > 0 for one in sequences])


@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid"])
def test_segments_longer_than_a_chunk(family: str) -> None:
    model = model_of(config_of(family))
    Policy(model)
    with wholly_fp64():
        _compare(model, long_rollouts(), ["tree"])


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_kept_prefixes_shorter_than_a_convolution(family: str) -> None:
    """Forks at 5, 6 and 7 tokens: what is kept of two forwards is one token each, on what is above it."""
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, VOCAB, 13)
    sequences = [trunk, *(np.append(trunk[:at], rng.integers(0, VOCAB, 12 - at)) for at in (5, 6, 7))]
    data = Rollouts(sequences, [np.arange(len(one)) > 0 for one in sequences])
    assert [part.num_nodes for part in hold(data.pack(), PLANS["kept"]) if part.kept] == [5, 1, 1]
    model = model_of(config_of(family))
    Policy(model)
    with wholly_fp64():
        _compare(model, data, ["kept"])


@given(rollouts())
def test_every_node_has_one_place_below_the_end_of_its_parent(data: Rollouts) -> None:
    forest = data.pack()
    segments = Segments.of(forest.parent, CPU)
    order, places = segments.order.numpy(), segments.places.numpy()
    assert (order[places] == np.arange(forest.num_nodes)).all()
    filled = np.ones(len(order), np.bool_) if segments.padded is None else ~segments.padded.numpy()
    assert filled.sum() == forest.num_nodes
    offset, ends_above = 0, np.zeros(0, np.int64)
    for level in segments.levels:
        ends = []
        for batch in level:
            size = batch.rows * batch.length
            nodes, there = (x[offset : offset + size].reshape(batch.rows, -1) for x in (order, filled))
            upper = ends_above[batch.above.numpy()] if len(ends_above) else -np.ones(batch.rows, np.int64)
            for row, first, parent in zip(nodes, there, upper, strict=True):
                own = row[first]
                assert (forest.parent[own] == [parent, *own[:-1]]).all()
                ends.append(own[-1])
            offset += size
        ends_above = np.array(ends)


@given(rollouts())
def test_a_convolution_sees_the_tokens_before_a_segment(data: Rollouts) -> None:
    forest = data.pack()
    tensors = forest_tensors(forest, CPU)
    row, places, last = (x.numpy() for x in tensors.segments.context(2))
    for node in range(forest.num_nodes):
        parent = int(forest.parent[node])
        above = int(forest.parent[parent]) if parent >= 0 else -1
        seen = row[places[node] - 2 : places[node] + 1]
        before = [above + 2, parent + 2] if above >= 0 else [1, parent + 2] if parent >= 0 else [0, 1]
        assert seen.tolist() == [*before, node + 2]
    ends = np.append(tensors.segments.starts[1:], forest.num_nodes)[: len(last)] - 1
    assert (last == row[places[ends][:, None] + [-1, 0]]).all()


def test_the_model_is_left_as_it_was() -> None:
    """Also when its forward fails."""
    model = model_of(config_of("lfm2"), torch.float32)
    policy, modules = Policy(model), recurrent_modules(model)
    assert len(modules) == 2
    policy.logprobs(pack_forest([[1, 2, 3], [1, 2, 4]]))
    with pytest.raises(IndexError):
        policy.logprobs(pack_forest([[1, 2, VOCAB + 1]]))
    assert recurrent_modules(model) == modules
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids).logits.shape == (1, 3, VOCAB)


def test_a_forward_of_somebodys_own_is_not_replaced() -> None:
    model = model_of(config_of("lfm2"), torch.float32)
    policy = Policy(model)
    [first, _] = recurrent_modules(model)
    first.forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(UserError, match="layer 0 mixes positions outside attention"):
        policy.logprobs(pack_forest([[1, 2, 3], [1, 2, 4]]))


def test_kernels_of_other_packages_are_called_as_the_layer_calls_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """flash-linear-attention names arguments otherwise; transformers drops what it has no name for."""
    name, calls = "torch_chunk_gated_delta_rule", 0
    stock = getattr(modeling_qwen3_5, name)

    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        nonlocal calls
        calls += 1
        assert initial_state is None or initial_state.is_contiguous()
        return stock(
            q, k, v, g, beta, initial_state=initial_state, output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )  # fmt: skip

    def wrapped(*args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        known = signature(chunk_gated_delta_rule).parameters
        given = {key: value for key, value in kwargs.items() if key in known}
        return chunk_gated_delta_rule(*args, **given)  # pyrefly: ignore [bad-argument-type]

    model, forest = model_of(config_of("qwen3_5_text"), torch.float32), pack_forest([[1, 2, 3], [1, 2, 4]])
    policy = Policy(model)
    expected = policy.logprobs(forest)
    monkeypatch.setattr(modeling_qwen3_5, name, wraps(stock)(wrapped))
    torch.testing.assert_close(policy.logprobs(forest), expected, rtol=0, atol=1e-5)
    assert calls == 4  # two layers, two levels
