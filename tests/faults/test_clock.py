"""A wall clock that jumps: no result, no deadline and no decision depends on it."""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path
from random import Random

import pytest

from mosaic_rollout.engine.sglang.weights import WeightFolder
from tests.faults.conftest import run
from tools.soak.campaign import differences

ROOT = Path(__file__).parents[2]
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today", "datetime.today"}


def test_a_run_under_a_jumping_clock_is_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every look at the wall clock is up to ten years off, forwards and backwards."""
    random, true = Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: true() + random.uniform(-3e8, 3e8))
    assert run(tmp_path / "run") == 0
    assert differences(tmp_path / "run", finished) == []


def test_nothing_of_ours_asks_the_wall_clock():
    """But for the name of a run folder (strftime), and AgentDojo's tools, whose clock is put back.

    A chat asks for the date where nobody gives it one; a run gives it the one in its config.toml. OpenAI's
    protocol says when an answer was made, which nothing of ours reads.
    """
    asks = set()
    for folder in ("mosaic_fast", "rollout", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in WALL:
                    asks.add(path.relative_to(ROOT).as_posix())
                if isinstance(node, ast.Attribute) and node.attr in ("st_mtime", "st_ctime", "st_mtime_ns"):
                    asks.add(path.relative_to(ROOT).as_posix())
    assert asks == {
        "rollout/mosaic_rollout/chat/chat.py",
        "rollout/mosaic_rollout/environments/agentdojo/environment.py",
        "rollout/mosaic_rollout/serving/app.py",
        "rollout/mosaic_rollout/serving/stream.py",
    }


class Weights:
    """Writes nothing but a name."""

    def save(self, folder: Path) -> None:
        (folder / "weights").touch()

    def named_tensors(self) -> list[tuple[str, object]]:
        return []


def test_the_weights_just_published_survive_a_clock_that_is_put_back(tmp_path: Path):
    """With leftovers of a killed run that had come further, and dates in the future."""
    for version in (7, 8, 9):
        (tmp_path / f"v{version:06d}").mkdir()
        os.utime(tmp_path / f"v{version:06d}", (2e9, 2e9))
    folder = WeightFolder(Weights(), tmp_path)  # pyrefly: ignore [bad-argument-type]
    for version in (3, 4, 5):
        published = folder.publish(version)
        os.utime(published, (2e9 - version, 2e9 - version))
        assert (published / "weights").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000004", "v000005"]
