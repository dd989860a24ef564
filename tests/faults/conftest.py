"""A small model, and a run of two steps that nothing disturbed."""

from pathlib import Path

import pytest

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.train import train

OPTIONS = [
    *("--steps", "2", "--rollout.prompts-per-step", "1", "--rollout.max-step-tokens", "24"),
    *("--env.eval-tasks", "0", "--trackers.console", "plain", "--model.device", "cpu"),
]


def run(folder: Path, *more: str) -> int:
    """A run in this process, as the command line starts it."""
    config, resume, name = parse_train_arguments([*OPTIONS, "--run-dir", str(folder), *more])
    return train(config, name, resume=resume)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(folder) == 0
    return folder
