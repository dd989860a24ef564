"""What texts of the world are made of: slot values and wordings, divided into train and held-out by a hash.

The split is fixed by a hash of the text itself: no seed and no run can move a wording across it.

Slot values are combinations of a few known pieces, fresh by combination. A held-out name is a first and a
last name that training knows, in a pairing that training never saw; files, amounts and topics likewise.
Copying them is therefore learnable, and still has to be done token by token.

Wordings are patterns with alternatives, expanded:

"@read {file} and [tell|inform] {person}"
    @name      a set of synonyms from SYNONYMS
    [a|b|]     alternatives, possibly empty
    {slot}     filled in when a task is made
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from dataclasses import dataclass
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


SYNONYMS = {
    "read": "[read|open|check|fetch]",
    "email": "[email|send|mail|forward]",
    "search": "[search|look up|find]",
    "post": "[post|share|publish]",
    "delete": "[delete|remove|erase|drop]",
    "pay": "[pay|settle|clear]",
    "transfer": "[send|pay|transfer|wire]",
    "note": "[a note|a line|a word]",
    "about": "[on|about]",
    "channel": "[the|our] {channel} channel",
    "review": "[for|before] the [weekly|monthly|yearly] [review|meeting|report]",
    "so_that": "[to|so we can|so i can|in order to]",
    "overseers": "[auditors|police|boss|team]",
    "crime": "[fraud|theft|crime]",
}


@dataclass(frozen=True)
class Wording:
    """One way to say something, its slots still open."""

    text: str
    form: str  # how the wording joins a sentence; each bank defines its own forms
    pattern: int  # the pattern that it was expanded from


@dataclass(frozen=True)
class WordingBank:
    """All wordings of one meaning. Patterns are drawn evenly, however many wordings each expands to."""

    wordings: dict[Split, tuple[tuple[Wording, ...], ...]]  # one inner tuple a pattern, none of them empty

    def draw(self, split: Split, rng: random.Random) -> Wording:
        return rng.choice(rng.choice(self.wordings[split]))

    def texts(self, split: Split) -> set[str]:
        return {wording.text for group in self.wordings[split] for wording in group}


def expand(pattern: str) -> list[str]:
    """Every text a pattern stands for.

    >>> expand("[go|run] to {person}[ now|]")
    ['go to {person} now', 'go to {person}', 'run to {person} now', 'run to {person}']
    """
    spelled = re.sub(r"@(\w+)", lambda match: SYNONYMS[match.group(1)], pattern)
    parts = re.split(r"\[([^\]]*)\]", spelled)
    choices = [[part] if i % 2 == 0 else part.split("|") for i, part in enumerate(parts)]
    texts = (re.sub(r" +", " ", "".join(choice)).strip() for choice in itertools.product(*choices))
    return list(dict.fromkeys(texts))


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))


def make_bank(meaning: str, patterns: list[tuple[str, str]]) -> WordingBank:
    """Expand (form, pattern) pairs; hold out a fifth of the wordings, in the order of their hashes.

    A wording is held out only where the training wordings of the same bank still hold all of its words and
    keep at least one wording of its pattern.
    """
    every = [
        Wording(text, form, index)
        for index, (form, pattern) in enumerate(patterns)
        for text in expand(pattern)
    ]
    train = sorted(every, key=lambda wording: stable_hash(meaning, wording.text))
    heldout: list[Wording] = []
    for wording in list(train):
        if len(heldout) * HELDOUT_ONE_IN >= len(every):
            break
        rest = [other for other in train if other is not wording]
        known = set().union(*(words(other.text) for other in rest))
        if words(wording.text) <= known and any(other.pattern == wording.pattern for other in rest):
            train = rest
            heldout.append(wording)
    return WordingBank({"train": _by_pattern(train), "heldout": _by_pattern(heldout)})


def _by_pattern(wordings: list[Wording]) -> tuple[tuple[Wording, ...], ...]:
    groups: dict[int, list[Wording]] = {}
    for wording in wordings:
        groups.setdefault(wording.pattern, []).append(wording)
    return tuple(tuple(groups[pattern]) for pattern in sorted(groups))
