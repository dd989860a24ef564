"""Tests of the Triton kernels, for whatever executes them: Triton's interpreter, ttsem, or a CUDA device.

    TRITON_INTERPRET=1 pytest tests/kernels/triton                  (make test-interpreter)
    MOSAIC_EMULATED=1 python -m ttsem.sanitize pytest tests/kernels/triton       (make test-ttsem)
    pytest tests/kernels/triton                                     on a machine with a CUDA device

Where none of these is the case nothing here is collected.
"""

import os

from hypothesis import Phase, settings

from tests.kernels.triton.machine import MACHINE

if os.environ.get("MOSAIC_QUICK_FAILURE") == "1":  # tests/mutants: an example that fails need not be small
    settings.register_profile(
        "quick failure", parent=settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate)
    )
    settings.load_profile("quick failure")

if MACHINE is None:
    collect_ignore_glob = ["test_*.py"]
