"""Slot values: each is a combination of a few known pieces, and fresh by combination.

A held-out name is a first and a last name that training knows, in a pairing that training never saw; files,
amounts and topics likewise. Copying them is therefore learnable, and still has to be done token by token.
"""

from __future__ import annotations

import itertools

from mosaic_rollout.environments.world.splits import SPLITS, Split, split_of


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
