"""A small model and the options of a short run, for every test that trains."""

from pathlib import Path

import pytest

from tools.warmstart.tokenizer import build_tokenizer
from tools.warmstart.training import Recipe, build_model

STEPS = 5
BANDIT = ("--attacks.pick", "bandit", "--attacks.names", "system: now", "note: also")
"""Its counts are part of what a resumed run goes on with."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model in the shape of the embedded one."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    model = build_model(Recipe(), len(tokenizer), int(tokenizer.pad_token_id), int(tokenizer.eos_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def options(model_folder: Path) -> list[str]:
    return [
        *("--model.path", str(model_folder), "--model.threads", "1", "--steps", str(STEPS)),
        *("--rollout.prompts-per-step", "2", "--rollout.max-step-tokens", "24", "--env.eval-tasks", "6"),
        *(
            "--trackers.console",
            "plain",
            "--optim.lr",
            "0.001",
            "--optim.epochs",
            "2",
            "--rollout.max-steps",
            "6",
        ),
        *("--rollout.max-rollout-tokens", "512", "--rollout.no-teach-loop", "--reward.length-target", "40"),
    ]
