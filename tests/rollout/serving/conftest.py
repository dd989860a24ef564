"""Tests with the clients of others run only when asked for; then a missing package is a failure.

MOSAIC_TEST_AGENTS=1 python -m pytest tests/rollout/serving
"""

import os

from tests.learner.conftest import model_folder, options

__all__ = ["model_folder", "options"]

collect_ignore_glob = [] if os.environ.get("MOSAIC_TEST_AGENTS") else ["test_installed_*.py"]
