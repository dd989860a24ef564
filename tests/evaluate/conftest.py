"""The configuration of the embedded model, for endpoints that serve it."""

from pathlib import Path

import pytest


@pytest.fixture
def world_config(tmp_path: Path) -> Path:
    """A file without a setting: the embedded model's limits, and no text that teaches the loop."""
    path = tmp_path / "world.toml"
    path.write_text("")
    return path
