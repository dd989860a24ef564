"""The ways to get the gradient of one step: ours, and what others do with the same model and rollouts.

    ours    each distinct (prefix, token) once
    flat    one padded row a rollout through the stock Hugging Face model, SDPA
    packed  all rollouts in one row of the stock model. On a CPU it has no varlen attention: SDPA gets the
            block-diagonal mask that transformers makes of the positions, and computes what it hides
    alone   all rollouts without sharing through our forward: what packing without a tree could be
    cut     our forward of parts within the token budget, each with a copy of the context it needs
    gather  the tree's tokens once through the stock model; each run of queries attends by SDPA to a gathered
            copy of the keys and values of its path, the way of varlen attention

The LM head runs on rows that predict a trained token, everywhere. The loss is the same weighted sum of
log-probs: sum(weights * logprobs) / T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from workloads import Workload

from mosaic_fast.execution import Execution, Piece
from mosaic_fast.execution.cost import work_of
from mosaic_fast.policy import Policy
from mosaic_fast.policy.forest_tensors import forest_tensors
from mosaic_kernels import PackedForest
from mosaic_kernels.attention.flash import build_gather

Backward = Callable[[], None]

TOLERANCE = 1e-4  # of a gradient's norm, fp32
_GATHER = "bench_gather"


def step_contenders(workload: Workload, weights: Tensor) -> dict[str, Backward]:
    """Backward passes by name. weights: [T] of the rollout tokens, in their order."""
    policy = Policy(workload.model)

    def backward(loss: Callable[[Workload, Tensor], Tensor]) -> Backward:
        return lambda: loss(workload, weights).backward()

    def planned(plan: str) -> Backward:
        def run() -> None:
            forest_backward(workload, policy, weights, plan)

        return run

    return {
        "ours": planned("auto"),
        "flat": backward(padded_loss),
        "packed": backward(packed_loss),
        "alone": planned("flat"),
        "gather": backward(gather_loss),
        "cut": planned("cut"),
    }


def token_weights(workload: Workload) -> Tensor:  # [T]
    """Random weights of all rollout tokens; those of untrained ones never count."""
    tokens = sum(len(s) for s in workload.sequences)
    return torch.randn(tokens, generator=torch.Generator().manual_seed(1))


def forest_backward(workload: Workload, policy: Policy, weights: Tensor, plan: str = "auto") -> Execution:
    """Ours, from packing the forest on, as in training."""
    forest = workload.forest
    execution = Execution(workload.tokens_per_microbatch, 1.0, workload.model.config, plan=plan)

    def loss_of(piece: Piece) -> Tensor:
        return (piece.logprobs * weights[piece.source]).sum() / len(weights)

    execution.backward(policy, execution.schedule(forest), loss_of)
    return execution


def padded_loss(workload: Workload, weights: Tensor) -> Tensor:
    trained = torch.from_numpy(np.concatenate(workload.trained))
    return (padded_logprobs(workload) * weights)[trained].sum() / len(weights)


def padded_logprobs(workload: Workload) -> Tensor:  # [T]
    """Log-probs of the rollout tokens, zero where not trained, from one padded row a rollout."""
    lengths = torch.tensor([len(s) for s in workload.sequences])
    token_ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    wanted = torch.zeros(token_ids.shape, dtype=torch.bool)
    for row, (sequence, mask) in enumerate(zip(workload.sequences, workload.trained, strict=True)):
        token_ids[row, : len(sequence)] = torch.from_numpy(sequence)
        wanted[row, : len(sequence)] = torch.from_numpy(mask)
    padding = (torch.arange(token_ids.shape[1]) < lengths[:, None]).long()
    hidden = _hidden(workload.model, token_ids, attention_mask=padding)
    predicted = wanted[:, 1:]
    logprobs = _logprobs(workload.model, hidden[:, :-1][predicted], token_ids[:, 1:][predicted])
    places = torch.from_numpy(np.flatnonzero(np.concatenate(workload.trained)))
    return logprobs.new_zeros(int(lengths.sum())).index_copy(0, places, logprobs)


def packed_loss(workload: Workload, weights: Tensor) -> Tensor:
    token_ids = torch.from_numpy(np.concatenate(workload.sequences))
    positions = torch.from_numpy(np.concatenate([np.arange(len(s)) for s in workload.sequences]))
    wanted = torch.from_numpy(np.flatnonzero(np.concatenate(workload.trained)))
    hidden = _hidden(workload.model, token_ids[None], position_ids=positions[None])[0]
    logprobs = _logprobs(workload.model, hidden[wanted - 1], token_ids[wanted])
    return (logprobs * weights[wanted]).sum() / len(weights)


def gather_loss(workload: Workload, weights: Tensor) -> Tensor:
    forest, model = workload.forest, workload.model
    tensors = forest_tensors(forest, torch.device("cpu"))
    with _attention(model, _GATHER):
        hidden = _hidden(
            model, tensors.tokens, position_ids=tensors.positions, gathered=gathered_runs(forest.subtree_end)
        )[0]
    rows = hidden[tensors.rows]
    head = model.get_output_embeddings()
    assert head is not None
    logprobs = torch.log_softmax(head(rows), -1)[tensors.edge_rows, tensors.targets]
    picked = logprobs[tensors.token_edges]
    return (picked * weights[tensors.trained_tokens]).sum() / len(weights)


Run = tuple[
    int, Tensor, Tensor | None
]  # number of queries, keys [K] int64, mask [Q, K] (None: causal square)


def gathered_runs(subtree_end: np.ndarray) -> list[Run]:
    """Runs of queries with the path each attends to."""
    gather = build_gather(subtree_end, np.arange(len(subtree_end)), torch.device("cpu"))
    queries, keys = gather.cu_queries.tolist(), gather.cu_keys.tolist()
    runs: list[Run] = []
    for index in range(len(queries) - 1):
        count, path = queries[index + 1] - queries[index], gather.keys[keys[index] : keys[index + 1]]
        mask = None
        if count < len(path):
            mask = torch.ones(count, len(path), dtype=torch.bool).tril_(len(path) - count)
        runs.append((count, path, mask))
    return runs


def gather_attention(
    query: Tensor,  # [1, Hq, U, D]
    key: Tensor,  # [1, Hkv, U, D]
    value: Tensor,  # [1, Hkv, U, D]
    runs: list[Run],
    scale: float | None = None,
) -> Tensor:  # [1, Hq, U, D]
    """One SDPA call a run, on a copy of the keys and values of its path."""
    queries = query.split([count for count, _, _ in runs], dim=2)
    parts = [
        F.scaled_dot_product_attention(
            rows, key.index_select(2, path), value.index_select(2, path),
            attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
        )
        for rows, (_, path, mask) in zip(queries, runs, strict=True)
    ]  # fmt: skip
    return torch.cat(parts, dim=2)


def _gather_in_model(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    gathered: list[Run] | None = None,
    scaling: float | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature."""
    assert gathered is not None
    return gather_attention(query, key, value, gathered, scaling).transpose(1, 2), None


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    AttentionInterface.register(_GATHER, _gather_in_model)
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _hidden(model: PreTrainedModel, token_ids: Tensor, **arguments: object) -> Tensor:  # [B, L, D]
    return model.get_decoder()(input_ids=token_ids, use_cache=False, **arguments).last_hidden_state


def _logprobs(model: PreTrainedModel, rows: Tensor, targets: Tensor) -> Tensor:  # [N]
    head = model.get_output_embeddings()
    assert head is not None
    return -F.cross_entropy(head(rows), targets, reduction="none")


def gradients(model: PreTrainedModel, backward: Callable[[], object]) -> dict[str, Tensor]:
    """Every parameter's gradient by name."""
    model.zero_grad()
    backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check_same(name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """AssertionError unless every gradient is within TOLERANCE of the expected one's norm."""
    assert set(found) == set(expected), f"{name} has gradients of other parameters"
    for parameter, gradient in expected.items():
        error = float((found[parameter] - gradient).norm() / gradient.norm().clamp_min(1e-9))
        assert error < TOLERANCE, f"{name}: gradient of {parameter} is off by {error:.1e}"


def check_gradients(model: PreTrainedModel, backwards: Mapping[str, Callable[[], object]]) -> None:
    """AssertionError names the contender whose gradients are not those of `flat`."""
    expected = gradients(model, backwards["flat"])
    for name, backward in backwards.items():
        if name != "flat":
            check_same(name, gradients(model, backward), expected)


def training_step(optimizer: torch.optim.Optimizer, backward: Callable[[], object]) -> None:
    optimizer.zero_grad()
    backward()
    optimizer.step()


def adamw(model: PreTrainedModel) -> torch.optim.AdamW:
    """A step so small that no contender's next round sees another model."""
    return torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)


def with_steps(
    model: PreTrainedModel, backwards: Mapping[str, Callable[[], object]]
) -> dict[str, Callable[[], object]]:
    """Whole steps: each backward pass with AdamW behind it."""
    optimizer = adamw(model)
    return {name: partial(training_step, optimizer, backward) for name, backward in backwards.items()}


def model_gflop(workload: Workload, forest: PackedForest) -> float:
    """What our schedule computes in a forward and backward pass, 6 operations a multiply-add."""
    execution = Execution(workload.tokens_per_microbatch, 1.0, workload.model.config)
    work = work_of(execution.schedule(forest).parts, workload.model.config)
    return 6e-9 * (work.linear + work.attention + work.head)
