"""Tests that need TRL run only when asked for, by `make test-trl`; then a missing package is a failure."""

import os

collect_ignore_glob = [] if os.environ.get("MOSAIC_TEST_TRL") else ["test_installed_*.py"]
