"""Files that a power cut leaves either as they were or whole: forced to disk, then renamed."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(unfinished: Path, final: Path) -> None:
    """Give a finished file its name: its content is on disk before, the name itself afterwards."""
    sync(unfinished)
    unfinished.replace(final)
    sync(final.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file anew; until it is whole and on disk, its name stands for what was there before."""
    unfinished = path.with_name(f".tmp-{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    put_in_place(unfinished, path)
