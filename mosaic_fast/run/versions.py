"""The versions of what computes a run, which a checkpoint names."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("mosaic-fast", "torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "sglang")


def versions() -> dict[str, str]:
    """Name -> version, of Python and of every package among them that is installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def other_versions(before: Mapping[str, object]) -> str | None:
    """What to tell where these are not the versions of now; None where they are."""
    now = versions()
    changed = [
        f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if not changed:
        return None
    return f"the checkpoint was made with other versions, so that bits may differ: {', '.join(changed)}"
