"""Browser tests run where Chromium is; with MOSAIC_TEST_REPORT=1 (make test-report) its absence is a failure.

MOSAIC_TEST_REPORT=1 python -m pytest tests/report

MOSAIC_TEST_TRACKERS=1 adds the real tracker packages, which must be installed then.
"""

import os
import shutil

_PRESENT = shutil.which("chromium") or shutil.which("chromium-browser")
collect_ignore_glob = [] if _PRESENT or os.environ.get("MOSAIC_TEST_REPORT") else ["test_browser*.py"]
if not os.environ.get("MOSAIC_TEST_TRACKERS"):
    collect_ignore_glob.append("test_installed_trackers.py")
