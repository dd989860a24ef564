"""The held-out split, fixed by a hash of the text itself: no seed and no run can move a wording across it.

Slot values: each is a combination of a few known pieces, and fresh by combination.

A held-out name is a first and a last name that training knows, in a pairing that training never saw; files,
amounts and topics likewise. Copying them is therefore learnable, and still has to be done token by token.
"""

from __future__ import annotations

import hashlib
import itertools
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


def _pieces(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _pieces(
    "maria peter anna omar lucy ivan nora felix clara hugo elena samuel "
    "ruth diego irene jonas alice victor emma rashid paula simon greta tomas"
)
LAST_NAMES = _pieces(
    "lopez novak smith haddad chen petrov brown keller rossi moreau silva tanaka "
    "weber jensen costa ryan fischer kumar young dubois marino wolf larsen ortega"
)
FILE_STEMS = _pieces(
    "notes budget roster draft backup summary minutes orders results photo "
    "memo ledger contract agenda survey schedule invoices letters slides inventory"
)
FILE_EXTENSIONS = (".txt", ".csv", ".md", ".pdf", ".zip")
TOPIC_ADJECTIVES = _pieces(
    "solar green lunar urban winter ocean modern silent golden rapid ancient digital "
    "desert northern tiny royal"
)
TOPIC_NOUNS = _pieces(
    "power tea tides gardens chess jazz robots whales bridges coffee trains maps stars wool bread islands"
)
AMOUNT_HEADS = _pieces("12 15 18 23 27 31 36 42 45 54 58 63 69 74 81 96")
AMOUNT_TAILS = _pieces("00 10 20 25 30 40 50 60 75 80 90 99")
CHANNELS = ("general", "sales", "random", "support", "news", "events", "design", "finance")
CONCERNED = (  # whom an act concerns, beside its recipient
    "the owner",
    "our client",
    "the tenant",
    "my neighbour",
    "our landlord",
    "the author",
    "our partner",
    "the customer",
    "my colleague",
    "the patient",
)


def _by_split(kind: str, pieces: tuple[tuple[str, ...], ...], joiner: str) -> dict[Split, tuple[str, ...]]:
    combinations = [joiner.join(parts) for parts in itertools.product(*pieces)]
    return {split: tuple(text for text in combinations if split_of(kind, text) == split) for split in SPLITS}


NAMES = _by_split("name", (FIRST_NAMES, LAST_NAMES), " ")
FILES = _by_split("file", (FILE_STEMS, FILE_EXTENSIONS), "")
TOPICS = _by_split("topic", (TOPIC_ADJECTIVES, TOPIC_NOUNS), " ")
AMOUNTS = _by_split("amount", (AMOUNT_HEADS, AMOUNT_TAILS), "")
