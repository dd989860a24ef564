"""Tests that need `inspect-evals` run only when asked for; then a missing package is a failure.

MOSAIC_TEST_AGENTHARM=1 python -m pytest tests/rollout/environments/agentharm
"""

import os

collect_ignore_glob = [] if os.environ.get("MOSAIC_TEST_AGENTHARM") else ["test_installed_*.py"]
