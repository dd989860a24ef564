"""The held-out split, fixed by a hash of the text itself: no seed and no run can move a wording across it."""

from __future__ import annotations

import hashlib
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
HELDOUT_ONE_IN = 5
_VERSION = "world-1"


def stable_hash(kind: str, text: str) -> int:
    """A 64-bit number that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{_VERSION}|{kind}|{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def split_of(kind: str, text: str) -> Split:
    """Which split a slot value belongs to; one in five is held out."""
    return "heldout" if stable_hash(kind, text) % HELDOUT_ONE_IN == 0 else "train"
