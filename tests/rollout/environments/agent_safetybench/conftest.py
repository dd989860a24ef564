"""Tests that need `agent-safety-bench-envs` run only when asked for; then a missing package is a failure.

MOSAIC_TEST_AGENT_SAFETYBENCH=1 python -m pytest tests/rollout/environments/agent_safetybench
"""

import os

collect_ignore_glob = [] if os.environ.get("MOSAIC_TEST_AGENT_SAFETYBENCH") else ["test_installed_*.py"]
