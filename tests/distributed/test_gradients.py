"""Updates and checkpoints on 2 and 3 ranks against one process, in fp64; each job runs every case."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.distributed.gradient_job import CASES, main
from tests.distributed.launch import run_forked

Found = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders of a job on 2 ranks, and of one on 3 that also loads what the first one has saved."""
    two, three = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("three")
    for ended in (run_forked(2, two, main, two, None), run_forked(3, three, main, three, two)):
        assert [code for code, _ in ended] == [0] * len(ended), ended
    return {2: two, 3: three}


@pytest.fixture(scope="module")
def found(jobs: dict[int, Path]) -> dict[int, Found]:
    return {ranks: json.loads((folder / "found.json").read_text()) for ranks, folder in jobs.items()}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_one_process(found: dict[int, Found], ranks: int, name: str):
    """So are the weights after two updates and every metric that is not about how it was run."""
    case = found[ranks][name]
    assert case["gradient"] <= 1e-10
    assert case["weights"] <= 1e-10
    assert case["metrics"] <= 1e-10
    if name == "ties":
        assert case["microbatches"] == 0
    else:
        assert case["size"] > 1e-3  # there is a gradient to compare


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_spread_once_an_update(found: dict[int, Found], ranks: int, name: str):
    """At the last micro-batch, for each of two layers and what is around them, in both epochs."""
    case = found[ranks][name]
    assert case["scatters"] == (0 if name == "ties" else 4 if name == "lora" else 6)
    if name == "checkpointing":
        assert case["microbatches"] > ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_are_even_where_there_is_enough_to_share(found: dict[int, Found], ranks: int):
    assert found[ranks]["qwen2 grpo"]["balance"] > 0.6
    assert found[ranks]["one rollout"]["balance"] == pytest.approx(1 / ranks)
    assert found[ranks]["one rollout"]["microbatches"] == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_coupled_loss_takes_one_pass_where_every_rank_holds_all_of_it(found: dict[int, Found], ranks: int):
    assert found[ranks]["gspo in one pass"]["one_pass"] == 1.0
    assert found[ranks]["phi3 dpo"]["one_pass"] == 0.0  # pairs lie on two ranks
    assert found[ranks]["qwen2 grpo"]["one_pass"] == -1.0  # not coupled


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_resumed_update_is_the_uninterrupted_one(found: dict[int, Found], ranks: int, dtype: str):
    assert found[ranks]["checkpoint"][f"{dtype} resumed"] == 0.0


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_checkpoint_is_the_same_bits_on_any_number_of_ranks(jobs: dict[int, Path], dtype: str):
    """Saved on 2 and on 3 ranks, loaded in one process, and of 2 ranks on 3, then written again."""
    for folder in jobs.values():
        assert digests(folder / dtype) == digests(folder / f"{dtype}-alone")
    assert digests(jobs[2] / dtype) == digests(jobs[3] / f"{dtype}-again")


def digests(checkpoints: Path) -> dict[str, str]:
    folder = checkpoints / "step-000001"
    names = ("model.safetensors", "trainer/state.safetensors", "progress.json", "manifest.json")
    paths = [folder / name for name in (*names, "config.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
