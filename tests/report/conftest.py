"""Browser tests run where Chromium and Playwright are; MOSAIC_TEST_REPORT=1 (make test-report) demands both.

MOSAIC_TEST_REPORT=1 python -m pytest tests/report

MOSAIC_TEST_TRACKERS=1 adds the real tracker packages, which must be installed then.
"""

import os
import shutil
from importlib.util import find_spec

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
_PRESENT = _BROWSER and find_spec("playwright")
collect_ignore_glob = [] if _PRESENT or os.environ.get("MOSAIC_TEST_REPORT") else ["test_browser*.py"]
if not os.environ.get("MOSAIC_TEST_TRACKERS"):
    collect_ignore_glob.append("test_installed_trackers.py")
