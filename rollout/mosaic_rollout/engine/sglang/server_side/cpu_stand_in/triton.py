"""SGLang's own stub of Triton, which it installs on macOS, where Triton is absent on Linux (saves 1 GB).

No Triton kernel can run on a CPU, so none is lost. The stub's text is read from the installed SGLang
(`sglang/_platform_stubs.py`) and run without the guard that reserves it for macOS.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

_FUNCTION, _BODY = "def install_platform_stubs", '    if "triton" not in sys.modules'


def install_triton() -> None:
    """Raises RuntimeError where the installed SGLang's stub is not laid out as in 0.5.23."""
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        raise RuntimeError(f"sglang is not installed for {sys.executable}")
    path = Path(package.origin).with_name("_platform_stubs.py")
    source = path.read_text(encoding="utf-8")
    if _FUNCTION not in source or _BODY not in source:
        raise RuntimeError(f"{path} is not that of SGLang 0.5.23: install triton, or that version")
    function = source.index(_FUNCTION)
    lines = source[source.index(_BODY, function) :].splitlines(keepends=True)
    body = lines[:1]
    for line in lines[1:]:  # the block of the `if`, not what follows it
        if line.strip() and not line.startswith("        "):
            break
        body.append(line)
    module = types.ModuleType("sglang_platform_stubs")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    text = source[:function] + "def install():\n" + "".join(body)
    exec(compile(text, str(path), "exec"), module.__dict__)
    module.install()
