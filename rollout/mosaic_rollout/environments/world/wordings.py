"""Wordings: patterns with alternatives, expanded, and divided into train and held-out wordings by hash.

"@read {file} and [tell|inform] {person}"
    @name      a set of synonyms from SYNONYMS
    [a|b|]     alternatives, possibly empty
    {slot}     filled in when a task is made
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

from mosaic_rollout.environments.world.values import HELDOUT_ONE_IN, Split, stable_hash

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
