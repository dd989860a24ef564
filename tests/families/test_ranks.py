"""On two ranks with sharded weights the gradient is that of one process, in fp64 to 1e-10."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mosaic_fast.distributed import ALONE, World, joined_world
from mosaic_fast.distributed.sharding import Sharding
from mosaic_fast.learner.execution import Execution, MicroBatch
from mosaic_fast.policy import Policy
from mosaic_fast.policy.shape import Shape
from tests.distributed.launch import run_forked
from tests.families.families import PROVED, config_of, model_of, shown, wholly_fp64
from tests.families.test_forests import rollouts
from tests.policy.policy_helpers import loss_weights


def gradients_on(world: World, family: str) -> dict[str, Tensor]:
    """Of a sum of log-probs in which each token has its own part."""
    model, forest = model_of(config_of(family)), rollouts().pack()
    policy = Policy(model)
    weights = loss_weights(forest.num_tokens)[0]

    def loss_of(part: MicroBatch) -> Tensor:
        return (weights[part.source] * part.logprobs).sum()

    with wholly_fp64():
        Sharding(policy, world, torch.device("cpu"))
        execution = Execution(20, 1.0, Shape.of(model.config), world=world)
        execution.backward(policy, execution.schedule(forest), loss_of)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def compare(folder: Path, families: list[str]) -> None:
    """What each rank runs: the furthest difference a family, relative to the largest gradient."""
    torch.set_num_threads(1)
    with joined_world() as world:
        furthest = {}
        for family in families:
            sharded, alone = gradients_on(world, family), gradients_on(ALONE, family)
            largest = max(float(g.abs().max()) for g in alone.values())
            pairs = ((sharded[name], g) for name, g in alone.items())
            furthest[family] = max(float((a - b).abs().max()) for a, b in pairs) / largest
        if world.is_first:
            (folder / "furthest.json").write_text(json.dumps(furthest))


@pytest.fixture(scope="module")
def furthest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("ranks")
    ended = run_forked(2, folder, compare, folder, shown(PROVED, ["gemma4_text"]))
    assert [code for code, _ in ended] == [0, 0], ended
    return json.loads((folder / "furthest.json").read_text())


@pytest.mark.parametrize("family", shown(PROVED, ["gemma4_text"]))
def test_two_ranks(furthest: dict[str, float], family: str) -> None:
    assert furthest[family] <= 1e-10
