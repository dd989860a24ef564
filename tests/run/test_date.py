"""The date that chat templates see: one a run, and the same one whenever it goes on."""

import datetime
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from mosaic_fast.config import Config, RolloutConfig
from mosaic_fast.config.read import load_config
from mosaic_fast.evaluate.store import kept_date
from mosaic_fast.run.folder import RunFolder

BEGUN = "2025-03-04"


def test_a_run_has_todays_date_or_its_own_and_keeps_it(tmp_path: Path):
    """Gone on with on a later day, without the date being said again."""
    config = Config(run_dir=str(tmp_path / "run"))
    with RunFolder(config, "world", resume=False) as folder:
        assert folder.dated(config).rollout.today == datetime.date.today()
        begun = config.model_copy(update={"rollout": RolloutConfig(date=BEGUN)})
        assert folder.dated(begun) == begun
        folder.open(begun, 0)
    with RunFolder(config, "world", resume=True) as folder:
        assert folder.dated(config).rollout.today == datetime.date(2025, 3, 4)
    assert load_config(tmp_path / "run" / "config.toml").rollout.date == BEGUN


def test_an_evaluation_goes_on_with_the_date_it_was_begun_with(tmp_path: Path):
    settings = tmp_path / "settings.json"
    for text, date in (
        (json.dumps({"date": BEGUN}), BEGUN),
        ('{"date": "soon"}', None),
        ("{}", None),
        ("", None),
    ):
        settings.write_text(text)
        assert kept_date(tmp_path) == date
    assert kept_date(tmp_path / "missing") is None


def test_what_is_no_date_is_refused():
    with pytest.raises(ValidationError, match="no date; write it as 2026-07-01"):
        RolloutConfig(date="yesterday")
