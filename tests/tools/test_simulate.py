"""The simulation of many ranks: what it must be whatever the coefficients, and what it refuses."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mosaic_fast.cli import run_cli
from mosaic_fast.learner.execution import CostModel
from mosaic_fast.learner.execution.cost import work_of
from mosaic_fast.learner.execution.schedule import whole
from mosaic_kernels import PackedForest, pack_forest
from tests.policy.policy_helpers import CONFIGS
from tools.simulate import Arguments, main, predict

SHAPE = CONFIGS["llama"]
COST = CostModel(linear=1e-9, attention=2e-9, head=3e-9, layer_calls=1e-6, kept=1e-9)
ROOMY = Arguments(tokens_per_microbatch=10**6)


def groups(count: int) -> PackedForest:
    """Groups of three on a common prompt, of unequal length."""
    draw = np.random.default_rng(0)
    prompt = draw.integers(0, 99, 40)
    sequences = [np.append(prompt, draw.integers(0, 99, 5 + draw.integers(0, 60))) for _ in range(3 * count)]
    return pack_forest(sequences, [np.arange(len(one)) >= 40 for one in sequences])


def test_one_rank_does_the_whole_work():
    forest = groups(4)
    one = predict(forest, SHAPE, COST, 1, ROOMY)
    assert one.compute_s == pytest.approx(COST.predict(work_of(whole(forest), SHAPE)))
    assert (one.balance, one.forwards, one.traffic_s) == (1.0, 1, 0.0)


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_no_rank_is_worth_more_than_one(ranks: int):
    """Where all fits into one forward; more ranks than rollouts are of no use."""
    forest = groups(4)
    alone, many = (predict(forest, SHAPE, COST, count, ROOMY) for count in (1, ranks))
    assert alone.compute_s <= ranks * many.compute_s * (1 + 1e-12)
    assert many.traffic_s > 0
    assert many.compute_s <= alone.compute_s * (1 + 1e-12)
    assert 0 < many.balance <= 1 + 1e-12


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ranks", "0"], "ranks = "),
        (["--tasks", "0"], "tasks = 0 must be above 0"),
        (["--gigabytes-per-s", "nan"], "gigabytes_per_s = nan"),
        (["--model", "nowhere"], "model: nowhere is not a folder"),
        (["--tasks", "1", "--tokens-per-microbatch", "9"], "tokens_per_microbatch must be "),
    ],
)
def test_a_bad_option_is_named(
    options: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["simulate", *options])
    assert run_cli(main) == 2
    assert f"error: {named}" in capsys.readouterr().err
