"""What hypothesis draws: the same on every machine and every time, or, where asked for, something new.

`python -m tests.fresh` (make test-fresh) asks for new draws: MOSAIC_FRESH_EXAMPLES is how many each property
is given, and --hypothesis-seed from where. No database, so that nothing is left over between runs; and what
fails is not made smaller, which takes minutes where an example runs an emulated kernel: it is printed as it
was drawn, with the line that draws it again. No deadlines: no test depends on time.
"""

import os
import signal

import pytest
from hypothesis import Phase, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the real hub; read when the library is imported
_SETTINGS = "_hypothesis_internal_use_settings"  # of a test with @given
FRESH = int(os.environ.get("MOSAIC_FRESH_EXAMPLES") or 0)

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a script, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "mosaic",
    deadline=None,
    database=None,
    print_blob=True,
    derandomize=not FRESH,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
settings.load_profile("mosaic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fresh draws come in the number asked for, whatever a test is content with otherwise."""
    for item in items if FRESH else ():
        known = vars(getattr(item, "obj", None)) if hasattr(item, "obj") else {}
        if usual := known.get(_SETTINGS):
            known[_SETTINGS] = settings(usual, max_examples=FRESH)
