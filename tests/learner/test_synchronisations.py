"""How often an update waits for the policy's device: never in a micro-batch, once in the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic_fast.config import OptimConfig
from mosaic_fast.learner.execution import Execution, MicroBatch
from mosaic_fast.learner.learner import Learner, Reference
from mosaic_fast.learner.optimizer import Optimizer
from mosaic_fast.policy import Policy
from mosaic_kernels import attention, logprob
from tests.learner.flat_oracle import forked_case
from tests.learner.learner_configs import config_of, moved
from tests.policy.policy_helpers import tiny_model

WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "repeat_interleave.Tensor",
)


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers that Python reads, and results whose size is data."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = str(func).removeprefix("aten.")
        by_mask = name.startswith("index.") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for one in args[1]  # pyrefly: ignore
        )
        if name.startswith(WAITING) or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    counted = Waits()
    tolist = torch.Tensor.tolist

    def noted(tensor: torch.Tensor) -> object:
        counted.found.append("tolist")
        return tolist(tensor)

    def as_index(name: str, value: object, device: torch.device, *, below: int | None = None) -> object:
        return torch.as_tensor(value, device=device)  # the range of a GPU's indices is not looked at

    with monkeypatch.context() as patched, counted:
        patched.setattr(torch.Tensor, "tolist", noted)
        for module in (attention, logprob):
            patched.setattr(module, "as_index", as_index)
        patched.setattr(attention, "_as_queries", lambda queries, *_: queries)
        yield counted.found


def of_an_update(name: str, tokens_per_microbatch: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """Waits of an update, and how many micro-batches it had."""
    config = config_of(name)
    forest = config.forest.model_copy(update={"tokens_per_microbatch": tokens_per_microbatch})
    config = config.model_copy(update={"forest": forest})
    model = tiny_model("qwen3")

    def policy_of(one: torch.nn.Module) -> Policy:
        return Policy(one, attention="reference", lm_head="reference")  # pyrefly: ignore

    learner = Learner(policy_of(model), Reference(policy_of(moved(model))), config)
    batch = forked_case().batch()
    with waits(monkeypatch) as found:
        figures = learner.update(batch, 0)
    return len(found), figures["tree/microbatches"]


def test_no_micro_batch_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss that is a sum over tokens: metrics are read at the end, of all micro-batches."""
    few, one = of_an_update("grpo", 4096, monkeypatch)
    many, several = of_an_update("grpo", 14, monkeypatch)
    assert (one, several > 3) == (1, True)
    assert many == few
    assert few == 2 + 1 + 5, "two optimiser steps, the metrics, the mismatch to the engine"


def test_nothing_is_copied_to_the_device_between_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from ordinary memory waits until the device has done all it was given."""
    model, forest = tiny_model("qwen3"), forked_case().batch().forest
    execution = Execution(14, 1.0, model.config, plan="cut")
    schedule = execution.schedule(forest)
    assert any(part.forest.source is not None for part in schedule.parts)
    done: list[str] = []
    made = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: done.append("copy") or made(array))

    def loss_of(micro_batch: MicroBatch) -> torch.Tensor:
        done.append("micro-batch")
        return micro_batch.logprobs.sum()

    policy = Policy(model, attention="reference", lm_head="reference")
    execution.backward(policy, schedule, loss_of)
    first = done.index("micro-batch")
    assert set(done[:first]) == {"copy"}
    assert done[first:] == ["micro-batch"] * len(schedule.parts)


def test_an_optimisers_step_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many weights there are, for the norm and for all checks together."""
    model = tiny_model("qwen3")
    optimizer = Optimizer(model, OptimConfig())
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        with waits(monkeypatch) as found:
            optimizer.step(1e-3, 1)
        assert found == ["tolist"]
