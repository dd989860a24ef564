"""The configuration of the embedded model, for endpoints that serve it."""

from pathlib import Path

import pytest


@pytest.fixture
def world_config(tmp_path: Path) -> Path:
    """A file that names the model alone: its limits, and no text that teaches the loop."""
    path = tmp_path / "world.toml"
    path.write_text('[model]\npath = "embedded"\n')
    return path
