"""An empty torchvision: PyPI's wheel does not load beside a CPU build of torch, and only images need it."""

from __future__ import annotations

import importlib.machinery
import sys
import types

_MODULES = ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional", ".io")


class _Empty(types.ModuleType):
    """Any name is an empty class, good enough to be imported and named in annotations."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"BICUBIC": None, "BILINEAR": None})


def install_torchvision() -> None:
    for suffix in _MODULES:
        name = f"torchvision{suffix}"
        module = _Empty(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
