"""Calibration: probes tell the kinds of work apart, drift does not reach coefficients, doubts are told."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mosaic_fast.errors import UserError
from mosaic_fast.learner.calibrate import measure as timing
from mosaic_fast.learner.calibrate.__main__ import main
from mosaic_fast.learner.calibrate.measure import (
    PROBES,
    PROBES_ON_GPU,
    FloatArray,
    Probe,
    Times,
    as_array,
    doubts,
    fit,
    prepared,
    sensitivity,
    steady,
)
from mosaic_fast.learner.execution import CostModel, load_cost_model

TRUTH = np.array([8e-11, 1.2e-10, 9e-11, 2e-3, 6e-9, 2e-9])  # about a CPU thread's


@pytest.fixture(scope="module")
def work() -> FloatArray:
    return np.array([prepared(probe)[2] for probe in PROBES])


@pytest.mark.parametrize("slow", range(6))
def test_the_probes_determine_every_coefficient(work: FloatArray, slow: int) -> None:
    """By the exact work, for a CPU's coefficients and with each of them halved: noise is amplified little."""
    cost = TRUTH * np.where(np.arange(6) == slow, 0.5, 1.0)
    shares = work * cost / (work @ cost)[:, None]
    assert np.linalg.cond(shares) < 12
    assert sensitivity(shares).max() < 6
    for left_out in range(len(PROBES)):
        # A forecast of each is possible: the others alone determine everything.
        assert sensitivity(np.delete(shares, left_out, axis=0)).max() < 12


# Seconds a unit on an H100, from its data sheet: products at half of 989 TFLOP/s, bytes at 3 TB/s, and 200
# launches of 5 us a layer.
ON_GPU = np.array([1.2e-14, 1.8e-14, 1.2e-14, 1e-3, 4e-12, 5e-12])


def test_the_probes_for_a_gpu_are_not_launches_alone(work: FloatArray) -> None:
    """They determine every coefficient there, by their exact work; those for a CPU would time launches."""
    on_gpu = np.array([prepared(probe)[2] for probe in PROBES_ON_GPU])

    def shares(work: FloatArray) -> FloatArray:
        return work * ON_GPU / (work @ ON_GPU)[:, None]

    assert shares(work)[:, 3].min() > 0.7
    assert shares(on_gpu)[2:, 3].max() < 0.5
    assert sensitivity(shares(on_gpu)).max() < 8
    assert sensitivity(shares(work)).max() > 60
    assert (on_gpu @ ON_GPU).sum() < 2.0  # seconds of a round; a calibration has seven


def test_sensitivity_is_what_noise_does(work: FloatArray) -> None:
    seconds, random = work @ TRUTH, np.random.default_rng(0)
    fits = [fit(work, seconds * (1 + 0.01 * random.standard_normal(len(seconds)))) for _ in range(200)]
    moved = np.std([as_array(one.cost) / TRUTH for one in fits], axis=0) / 0.01
    np.testing.assert_allclose(moved, sensitivity(work * TRUTH / seconds[:, None]), rtol=0.2)


def drifting(seconds: FloatArray, rounds: int, noise: float, seed: int) -> FloatArray:  # [R, P]
    """A machine that slows to two thirds and back, is disturbed in one run of six, and jitters."""
    random = np.random.default_rng(seed)
    pace = 1.25 + 0.25 * np.sin(random.uniform(0, 7) + np.arange(rounds))[:, None]
    disturbed = np.where(random.random((rounds, len(seconds))) < 1 / 6, random.uniform(1.2, 2), 1)
    return seconds * pace * disturbed * np.exp(noise * random.standard_normal((rounds, len(seconds))))


@pytest.mark.parametrize("seed", range(5))
def test_drift_does_not_reach_the_coefficients(work: FloatArray, seed: int) -> None:
    """Their ratios decide; the pace of the fastest round only scales all of them."""
    times = drifting(work @ TRUTH, 6, 0.02, seed)
    found = as_array(fit(work, steady(times).seconds).cost)
    ratios = found / TRUTH * TRUTH[0] / found[0]
    np.testing.assert_allclose(ratios, 1, atol=0.12)
    assert 0.95 < found[0] / TRUTH[0] < 1.55


def test_pace_and_probes_are_told_apart_exactly() -> None:
    seconds, pace = np.array([3.0, 0.1, 7.0, 2.0]), np.array([1.5, 1.0, 1.2])
    times = steady(pace[:, None] * seconds)
    np.testing.assert_allclose(times.seconds, seconds)
    np.testing.assert_allclose(times.pace, pace)
    np.testing.assert_allclose(times.spread, 0, atol=1e-12)


def test_fit_finds_the_coefficients() -> None:
    random = np.random.default_rng(0)
    work, truth = random.random((12, 6)) * [1e9, 1e8, 1e8, 10, 1e6, 1e6], TRUTH * [1, 1, 0, 1, 1, 1]
    exact = fit(work, work @ truth)
    np.testing.assert_allclose(as_array(exact.cost), truth, rtol=1e-6, atol=1e-16)
    np.testing.assert_allclose(exact.forecast, 0, atol=1e-6)
    noisy = fit(work, work @ truth * random.uniform(0.5, 1.5, 12))
    assert (as_array(noisy.cost) >= 0).all()


def test_a_forecast_knows_nothing_of_its_probe(work: FloatArray) -> None:
    seconds = work @ TRUTH
    seconds[3] *= 2
    found = fit(work, seconds)
    assert found.forecast[3] == pytest.approx(-0.5)
    assert abs(found.fitted[3]) < 0.5


def test_doubts_name_what_is_poor(work: FloatArray) -> None:
    seconds = work @ TRUTH
    calm = Times(seconds, np.zeros(len(seconds)), np.ones(6))
    assert doubts(PROBES, calm, fit(work, seconds)) == []
    free = fit(work, work @ (TRUTH * [1, 1, 1, 1, 0, 1]))
    free = replace(free, cost=replace(free.cost, kept=0.0), error=np.where(np.arange(6) == 4, np.inf, 0))
    assert "kept: 0 fits best" in doubts(PROBES, calm, free)[0]
    spoilt = seconds * np.where(np.arange(len(seconds)) == 3, 1.4, 1)
    said = doubts(PROBES, calm, fit(work, spoilt))
    assert any(f"{PROBES[3]}, {PROBES[3].plan}: forecast off by -29%" in one for one in said)
    restless = replace(calm, spread=np.full(len(seconds), 0.3))
    assert len(doubts(PROBES, restless, fit(work, seconds))) == len(PROBES)


def test_calibrate_writes_a_file_that_training_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small probes, run for real, and timed by a clock that moves by a millisecond whenever it is read."""
    ticks = itertools.count()
    for clock in ("process_time", "perf_counter"):
        monkeypatch.setattr(timing.time, clock, lambda: next(ticks) * 1e-3)
    probes = [
        Probe("narrow", 0, 1, 8, 1, 8, "tree"), Probe("narrow", 0, 4, 8, 7, 8, "flat"),
        Probe("keys", 8, 3, 4, 4, 12, "kept"), Probe("keys", 8, 3, 4, 4, 12, "cut"),
        Probe("narrow", 0, 1, 40, 2, 40, "tree"),
    ]  # fmt: skip
    threads = str(torch.get_num_threads())
    monkeypatch.setattr("sys.argv", ["calibrate", "--out", str(tmp_path / "c.toml"), "--threads", threads])
    assert main(probes) == 0
    assert any(value > 0 for value in astuple(load_cost_model(str(tmp_path / "c.toml"))))
    assert "forecasts of probes off by" in (tmp_path / "c.toml").read_text()
    printed = capsys.readouterr().out
    assert "--forest.cost-model" in printed.replace("\n", "")
    assert "POOR:" in printed  # five probes of so few tokens cannot tell six kinds of work apart
    for option, message in (("--device", "is not one of auto"), ("--dtype", "is not one of float32")):
        monkeypatch.setattr("sys.argv", ["calibrate", option, "abacus"])
        with pytest.raises(UserError, match=message):
            main()


def test_a_cost_model_has_as_many_numbers_as_there_are_kinds_of_work(work: FloatArray) -> None:
    assert work.shape == (len(PROBES), len(astuple(CostModel(*TRUTH.tolist()))))
    assert (work.max(axis=0) > 0).all()
