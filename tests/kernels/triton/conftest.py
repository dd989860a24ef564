"""Tests of the Triton kernels, for whatever executes them: Triton's interpreter, ttsem, or a CUDA device.

    TRITON_INTERPRET=1 pytest tests/kernels/triton                  (make test-interpreter)
    MOSAIC_EMULATED=1 python -m ttsem.sanitize pytest tests/kernels/triton       (make test-ttsem)
    pytest tests/kernels/triton                                     on a machine with a CUDA device

Where none of these is the case nothing here is collected.
"""

from tests.kernels.triton.machine import MACHINE

if MACHINE is None:
    collect_ignore_glob = ["test_*.py"]
