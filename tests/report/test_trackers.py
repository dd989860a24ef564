"""Trackers: what they are handed, and what is said where one is not installed."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from mosaic_fast.config import Config, TrackersConfig
from mosaic_fast.errors import UserError
from mosaic_fast.run.trackers import Trackers, require_trackers


def logging_to(*names: str) -> Config:
    return Config(trackers=TrackersConfig.model_validate({"log_to": names, "project": "p"}))


def test_without_a_tracker_nothing_is_imported(tmp_path: Path):
    with Trackers(Config(), tmp_path) as trackers:
        trackers.log({"step": 1.0, "x": 2.0})
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"trackers\.log_to has 'wandb'.*pip install 'mosaic-fast\[wandb\]'"):
        require_trackers(logging_to("wandb"))
    with pytest.raises(ValidationError, match="log_to"):
        logging_to("mlflow")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_rows_go_out_under_their_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    """The package is a stand-in that writes down its calls; MOSAIC_TEST_TRACKERS=1 has the real ones."""
    calls: list[tuple[str, object]] = []

    class StandIn(ModuleType):
        def init(self, **options: object) -> None:
            calls.append(("init", (options["project"], options["name"], options["resume"])))

        def log(self, row: dict[str, float], step: int) -> None:
            calls.append((f"step {step}", row))

        def finish(self) -> None:
            calls.append(("finish", None))

    monkeypatch.setitem(sys.modules, name, StandIn(name))
    with Trackers(logging_to(name), tmp_path) as trackers:
        trackers.log({"step": 3.0, "loss": 0.5})
    assert calls == [("init", ("p", tmp_path.name, "allow")), ("step 3", {"loss": 0.5}), ("finish", None)]
