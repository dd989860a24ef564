"""Tests that need `bfcl-eval` run only when asked for; then a missing package is a failure.

MOSAIC_TEST_BFCL=1 python -m pytest tests/rollout/environments/bfcl
"""

import os

collect_ignore_glob = [] if os.environ.get("MOSAIC_TEST_BFCL") else ["test_installed_*.py"]
