"""What is held is one path: memory does not grow with the number of branches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mosaic_fast.learner.execution import Execution
from mosaic_fast.policy import Policy
from mosaic_fast.policy.layout import checkpoint_activations
from mosaic_kernels import pack_forest
from tests.policy.policy_helpers import tiny_model
from tests.setup.memory.small_models import peak_bytes

PROMPT, OWN, BUDGET = 160, 40, 240


def peak_of_a_backward(branches: int, plan: str, checkpointed: bool) -> int:
    """Most bytes that PyTorch holds during a backward pass, beyond weights and their gradients."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 23, PROMPT)
    sequences = [np.append(prompt, rng.integers(0, 23, OWN)) for _ in range(branches)]
    forest = pack_forest(sequences, [np.arange(PROMPT + OWN) >= PROMPT] * branches)
    model = tiny_model("qwen3", torch.float32)
    if checkpointed:
        checkpoint_activations(model)
    policy = Policy(model)
    execution = Execution(forest.num_nodes if plan == "tree" else BUDGET, 1.0, model.config, plan=plan)
    schedule = execution.schedule(forest)

    def backward() -> None:
        execution.backward(policy, schedule, lambda micro_batch: micro_batch.logprobs.sum())

    backward()  # gradients and indices are there from now on
    return peak_bytes(backward)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_memory_of_held_prefixes_is_that_of_a_path(checkpointed: bool) -> None:
    few, many = (peak_of_a_backward(n, "kept", checkpointed) for n in (4, 24))
    assert many < 1.25 * few  # six times the branches; a few small tensors are freed late
    assert peak_of_a_backward(24, "tree", checkpointed) > 2 * many  # which does grow
