"""What SGLang 0.5.23 lacks on a machine without a GPU, and nothing more.

SGLang's wheel runs unmodified: scheduler, radix cache, model, sampler, HTTP server are its own. Missing on a
CPU are binary packages. They are replaced before SGLang is imported, each in a module of its own:

- `torchvision.py`: an empty torchvision, which is needed for images only;
- `sgl_kernel.py`: PyTorch versions of two functions of its kernel package; every other name raises;
- `triton.py`: SGLang's own Triton stub (made for macOS), where Triton is not installed;
- `seeded.py`: optional, lets deterministic mode run with PyTorch's attention.

Imported by SGLang's environment only, with this package's folder on sys.path.
"""

from __future__ import annotations

import importlib.util
import os


def install(*, seeded: bool) -> None:
    """Put the stand-ins in place. Call before the first import of sglang.

    seeded: allow --enable-deterministic-inference, so that a request's sampling_seed is honoured.
    """
    os.environ["SGLANG_USE_CPU_ENGINE"] = os.environ.get("SGLANG_USE_CPU_ENGINE") or "1"
    from transformers.utils.import_utils import is_torchvision_available

    if not is_torchvision_available():  # asked first, so that transformers remembers the true answer
        from cpu_stand_in.torchvision import install_torchvision

        install_torchvision()
    if importlib.util.find_spec("sgl_kernel") is None:
        from cpu_stand_in.sgl_kernel import install_sgl_kernel

        install_sgl_kernel()
    if importlib.util.find_spec("triton") is None:
        from cpu_stand_in.triton import install_triton

        install_triton()
    if seeded:
        from cpu_stand_in.seeded import allow_seeds

        allow_seeds()
