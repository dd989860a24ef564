"""The ways to get the gradient of one step: ours, and what others do with the same model and rollouts.

    ours    each distinct (prefix, token) once
    flat    one padded row a rollout through the stock Hugging Face model, SDPA
    packed  all rollouts in one row of the stock model. SDPA has no varlen attention: it gets the
            block-diagonal mask that transformers makes of the positions, and computes what it hides
    alone   all rollouts without sharing through our forward: what packing without a tree could be
    cut     our forward of parts within the token budget, each with a copy of the context it needs
    gather  the tree's tokens once through the stock model; each run of queries attends by SDPA to a gathered
            copy of the keys and values of its path, the way of varlen attention

On CUDA also

    varlen        as gather, by PyTorch's varlen_attn: one call for all runs
    flash         as gather, by flash-attn's varlen function
    flat_flash    as flat, by flash-attn
    packed_flash  as packed, by flash-attn's varlen function, the way trainers pack

The LM head runs on rows that predict a trained token, everywhere. The loss is the same weighted sum of
log-probs: sum(weights * logprobs) / T.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from agreement import Expected
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from workloads import Workload

from mosaic_fast.learner.execution import Execution, MicroBatch
from mosaic_fast.learner.execution.cost import work_of
from mosaic_fast.policy import Policy
from mosaic_fast.policy.forest_tensors import forest_tensors
from mosaic_fast.policy.layout import checkpoint_activations
from mosaic_kernels import PackedForest, tree_attention
from mosaic_kernels.attention.flash import Gather, build_gather

Backward = Callable[[], None]

Attend = Callable[
    [Tensor, Tensor, Tensor, float | None], Tensor
]  # q, k, v [1, H, U, D], scale -> [1, Hq, U, D]

ON_CUDA = ("varlen", "flash", "flat_flash", "packed_flash")
_GATHER, _FLASH = "bench_gather", "flash_attention_2"


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
        "gather": backward(partial(gather_loss, attention=_by_sdpa)),
        "cut": planned("cut"),
        "varlen": backward(partial(gather_loss, attention=_by_varlen)),
        "flash": backward(partial(gather_loss, attention=_by_flash)),
        "flat_flash": backward(partial(_with_flash, loss=padded_loss)),
        "packed_flash": backward(partial(_with_flash, loss=packed_loss)),
    }


def token_weights(workload: Workload) -> Tensor:  # [T] fp32, on the model's device
    """Random weights of all rollout tokens; those of untrained ones never count."""
    tokens = sum(len(s) for s in workload.sequences)
    weights = torch.randn(tokens, generator=torch.Generator().manual_seed(1))
    return weights.to(workload.model.device)


def forest_backward(workload: Workload, policy: Policy, weights: Tensor, plan: str = "auto") -> Execution:
    """Our forward and backward pass, from packing the forest on, as in training."""
    forest = workload.forest
    execution = Execution(workload.tokens_per_microbatch, 1.0, workload.model.config, plan=plan)

    def loss_of(micro_batch: MicroBatch) -> Tensor:
        return (micro_batch.logprobs * weights[micro_batch.source]).sum() / len(weights)

    execution.backward(policy, execution.schedule(forest), loss_of)
    return execution


def padded_loss(workload: Workload, weights: Tensor) -> Tensor:
    trained = _on_model(workload, np.concatenate(workload.trained))
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
    device = workload.model.device
    token_ids, wanted, padding = token_ids.to(device), wanted.to(device), padding.to(device)
    hidden = _hidden(workload.model, token_ids, attention_mask=padding)
    predicted = wanted[:, 1:]
    logprobs = _logprobs(workload.model, hidden[:, :-1][predicted], token_ids[:, 1:][predicted])
    places = _on_model(workload, np.flatnonzero(np.concatenate(workload.trained)))
    return logprobs.new_zeros(int(lengths.sum())).index_copy(0, places, logprobs)


def packed_loss(workload: Workload, weights: Tensor) -> Tensor:
    token_ids = _on_model(workload, np.concatenate(workload.sequences))
    positions = _on_model(workload, np.concatenate([np.arange(len(s)) for s in workload.sequences]))
    wanted = _on_model(workload, np.flatnonzero(np.concatenate(workload.trained)))
    hidden = _hidden(workload.model, token_ids[None], position_ids=positions[None])[0]
    logprobs = _logprobs(workload.model, hidden[wanted - 1], token_ids[wanted])
    return (logprobs * weights[wanted]).sum() / len(weights)


def _with_flash(workload: Workload, weights: Tensor, *, loss: Callable[[Workload, Tensor], Tensor]) -> Tensor:
    with _attention(workload.model, _FLASH):
        return loss(workload, weights)


def gather_loss(
    workload: Workload, weights: Tensor, attention: Callable[[PackedForest, torch.device], Attend]
) -> Tensor:
    forest, model = workload.forest, workload.model
    tensors = forest_tensors(forest, model.device)
    with _attention(model, _GATHER):
        hidden = _hidden(
            model, tensors.tokens, position_ids=tensors.positions, attend=attention(forest, model.device)
        )[0]
    rows = hidden[tensors.rows]
    head = model.get_output_embeddings()
    assert head is not None
    logprobs = torch.log_softmax(head(rows).float(), -1)[tensors.edge_rows, tensors.targets]
    picked = logprobs[tensors.token_edges]
    return (picked * weights[tensors.trained_tokens]).sum() / len(weights)


def _by_sdpa(forest: PackedForest, device: torch.device) -> Attend:
    runs = gathered_runs(forest.subtree_end, device)
    return lambda q, k, v, scale: gather_attention(q, k, v, runs, scale)


def _by_varlen(forest: PackedForest, device: torch.device) -> Attend:
    gather = gather_of(forest.subtree_end, device)
    return _tokens_first(lambda q, k, v, scale: varlen_attention(q, k, v, gather, scale))


def _by_flash(forest: PackedForest, device: torch.device) -> Attend:
    end = torch.from_numpy(forest.subtree_end).to(device)
    return _tokens_first(lambda q, k, v, scale: tree_attention(q, k, v, end, scale=scale, backend="flash"))


def _tokens_first(attend: Attend) -> Attend:
    """From [1, H, U, D] to [U, H, D] and back."""

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return attend(q, k, v, scale).transpose(0, 1)[None]

    return run


def _gather_in_model(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Attend | None = None,
    scaling: float | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature."""
    assert attend is not None
    return attend(query, key, value, scaling).transpose(1, 2), None


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    AttentionInterface.register(_GATHER, _gather_in_model)
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _on_model(workload: Workload, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(workload.model.device)


def _hidden(model: PreTrainedModel, token_ids: Tensor, **arguments: object) -> Tensor:  # [B, L, D]
    return model.get_decoder()(input_ids=token_ids, use_cache=False, **arguments).last_hidden_state


def _logprobs(model: PreTrainedModel, rows: Tensor, targets: Tensor) -> Tensor:  # [N]
    head = model.get_output_embeddings()
    assert head is not None
    return -F.cross_entropy(head(rows).float(), targets, reduction="none")


def gradients(model: PreTrainedModel, backward: Callable[[], object]) -> dict[str, Tensor]:
    """Every parameter's gradient, as "d <name>"."""
    model.zero_grad()
    backward()
    found = {f"d {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def expected_gradients(
    workload: Workload, flat: Backward, flat_loss: Callable[[Workload], Tensor]
) -> Expected:
    """The flat batch's; in bf16 beside those of the same weights in fp32.

    flat_loss: the loss of the flat batch through the model of the workload it is given.
    """
    plain = gradients(workload.model, flat)
    if workload.model.dtype == torch.float32:
        return Expected(plain)
    wide = copy.deepcopy(workload.model).float().train()
    checkpoint_activations(wide)  # a flat batch in fp32 has twice the activations
    return Expected(gradients(wide, lambda: flat_loss(replace(workload, model=wide)).backward()), plain)


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
    """Whole steps: each backward pass with AdamW behind it.

    Gradients and AdamW's moments are there before, so that no contender's peak has them alone.
    """
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {name: partial(training_step, optimizer, backward) for name, backward in backwards.items()}


def model_gflop(workload: Workload, forest: PackedForest) -> float:
    """What our schedule computes in a forward and backward pass, 6 operations a multiply-add."""
    execution = Execution(workload.tokens_per_microbatch, 1.0, workload.model.config)
    work = work_of(execution.schedule(forest).parts, workload.model.config)
    return 6e-9 * (work.linear + work.attention + work.head)


Run = tuple[
    int, Tensor, Tensor | None
]  # number of queries, keys [K] int64, mask [Q, K] (None: causal square)


def gather_of(subtree_end: np.ndarray, device: torch.device) -> Gather:
    """All runs of queries of a forest and the paths they attend to. subtree_end: [U]."""
    return build_gather(subtree_end, np.arange(len(subtree_end)), device)


def gathered_runs(subtree_end: np.ndarray, device: torch.device) -> list[Run]:
    """Runs of queries with the path each attends to."""
    gather = gather_of(subtree_end, device)
    queries, keys = gather.cu_queries.tolist(), gather.cu_keys.tolist()
    runs: list[Run] = []
    for index in range(len(queries) - 1):
        count, path = queries[index + 1] - queries[index], gather.keys[keys[index] : keys[index + 1]]
        mask = None
        if count < len(path):
            mask = torch.ones(count, len(path), dtype=torch.bool, device=device).tril_(len(path) - count)
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


def varlen_attention(
    query: Tensor,  # [U, Hq, D]
    key: Tensor,  # [U, Hkv, D]
    value: Tensor,  # [U, Hkv, D]
    gather: Gather,
    scale: float | None = None,
) -> Tensor:  # [U, Hq, D]
    """PyTorch's varlen_attn, causal and aligned at the end of each path. CUDA, bf16 and fp16."""
    module = importlib.import_module("torch.nn.attention.varlen")
    return module.varlen_attn(
        query, key.index_select(0, gather.keys), value.index_select(0, gather.keys),
        gather.cu_queries, gather.cu_keys, gather.longest_queries, gather.longest_keys,
        scale=scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
