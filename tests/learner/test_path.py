"""The path of a batch through the files of an update, as docs/structure.md draws it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import mosaic_fast
from mosaic_fast.config import Config
from mosaic_fast.learner.learner import Learner
from mosaic_fast.policy import Policy
from tests.learner.flat_oracle import forked_case
from tests.policy.policy_helpers import tiny_model

ROOT = Path(mosaic_fast.__file__).parent
PATH = (
    "learner/learner.py",
    "learner/step_batch.py",
    "learner/accumulate.py",
    "learner/execution/execution.py",
    "policy/policy.py",
    "policy/forward.py",
    "policy/layer.py",
    "policy/attention.py",
)


def test_an_update_enters_no_file_of_its_path_more_than_twice():
    """Counted are the functions by which a file is entered from another file of the package."""
    config = Config.model_validate({"loss": {"kl_weight": 0.0}})
    learner, batch = Learner(Policy(tiny_model("qwen3").train()), None, config), forked_case().batch()
    entered: dict[str, set[str]] = {}

    def ours(frame: FrameType | None) -> str | None:
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(str(ROOT)):
                return file
            frame = frame.f_back
        return None

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(ROOT)) and ours(frame.f_back) != file:
            name = Path(file).relative_to(ROOT).as_posix()
            entered.setdefault(name, set()).add(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        learner.update(batch, 0)
    finally:
        sys.setprofile(None)
    entered["learner/execution/execution.py"].discard("Execution.figures")  # after the batch is done
    found = {name: sorted(entered.get(name, ())) for name in PATH}
    assert all(1 <= len(names) <= 2 for names in found.values()), found
