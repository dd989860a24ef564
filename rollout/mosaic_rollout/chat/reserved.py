"""Texts that steer a model, kept out of data: what a tool, a user or a policy writes is never one of them.

A tokenizer turns some texts into tokens of their own wherever it meets them (`<|im_end|>`), and a template
and the loop mark their parts by others (`<tool_response>`, `<think>`). In data, a space after its first
character makes such a word ordinary text. That is done before the template sees the data, so that what the
model reads is the template's own rendering of them, merges over the seams included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from mosaic_rollout.plain_json import without_surrogates
from mosaic_rollout.types import JsonValue

_MARK = re.compile(r"[<\[{|｜].*\w.*[>\]}|｜]", re.DOTALL)
_BLANK = " \t\r\n▁"  # the last one is SentencePiece's space
_QUOTES = "'\"`^~*"
_MOST_ROUNDS = 16


class Reserved:
    """The words that one tokenizer, one template and the loop reserve.

    words: those of template and loop. own: those that a message of the assistant's may hold. Of the
    tokenizer's added tokens come all special ones, and of the others those that look like marks: tokens made
    of plain words or of white space are ordinary text. A token of a single character cannot be broken up and
    is left alone.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, words: Iterable[str], own: re.Pattern[str]
    ) -> None:
        known, self._own = set(words), own
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        tokens = {
            text: token_id
            for text, token_id in tokenizer.get_added_vocab().items()
            if _can_be_broken_up(text) and (added.get(text, True) or text in known or _MARK.fullmatch(text))
        }
        self._live = frozenset(tokens.values()) - {tokenizer.unk_token_id}
        self.tokens = re.compile(_any_of(tokens))
        """Matches the reserved words that are tokens of their own."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        normaliser = getattr(backend, "normalizer", None)
        self._normalise = cast("Callable[[str], str] | None", getattr(normaliser, "normalize_str", None))
        words = {word for word in (*known, *tokens) if _can_be_broken_up(word)}
        self._hits = re.compile(_any_of(words))
        normal = {self._normal(word) for word in words}
        self._normal_hits = re.compile(_any_of({*words, *(word for word in normal if len(word) > 1)}))
        self._joined = "\0".join(words)
        self._longest = max(map(len, words), default=0)
        self._openings = frozenset(word[:end] for word in words for end in range(1, len(word)))
        self._endings = frozenset(word[start:] for word in words for start in range(1, len(word)))
        self._quote = next(quote for quote in _QUOTES if quote not in self._joined)

    def live(self, token_ids: Iterable[int]) -> list[int]:
        """Those of the tokens that steer, in their order."""
        return [token_id for token_id in token_ids if token_id in self._live]

    def neutral(self, text: str) -> str:
        """A text of data without any reserved word in it; ordinary text is returned as it is.

        Words count as the tokenizer sees them, after its normaliser: U+FF1C may be its "<". Halves of
        surrogate pairs, which no tokenizer takes, become U+FFFD.
        """
        text = without_surrogates(text)
        for _ in range(_MOST_ROUNDS):
            if self._hits.search(text):
                text = self._hits.sub(_broken_up, text)
            elif self._normalise and self._normal_hits.search(self._normal(text)):
                text = self._spelt_out(text)
            else:
                return text
        while self._normal_hits.search(text := self._normal(text)):  # each mend made another word
            text = self._normal_hits.sub(lambda match: match.group()[1:], text)
        return text

    def neutral_own(self, text: str) -> str:
        """The same for what an assistant says, whose own words stay."""
        return _between(text, self._own, self.neutral)

    def could_complete(self, text: str, *, own: bool = False) -> bool:
        """Whether a reserved word might come about where this text meets what is written beside it."""
        if own and self._own.search(text):
            return True
        if not text:
            return False
        if len(text) < self._longest and text in self._joined:
            return True
        start, end = text[: self._longest], text[-self._longest :]
        return any(end[i:] in self._openings for i in range(len(end))) or any(
            start[: i + 1] in self._endings for i in range(len(start))
        )

    def quoted(self, text: str, *, own: bool = False) -> str:
        """A text that could complete a word, in quotes, so that it does not; another one as it is."""
        if not self.could_complete(text, own=own):
            return text
        return _between(text, self._own, self._in_quotes) if own else self._in_quotes(text)

    def _in_quotes(self, text: str) -> str:
        return f"{self._quote}{text}{self._quote}" if text else text

    def _normal(self, text: str) -> str:
        if self._normalise is None:
            return text
        return self._normalise(text).replace("▁", " ").strip(" ")

    def _spelt_out(self, text: str) -> str:
        """The text with its characters as the normaliser writes them, and the words in that broken up."""
        spelt = "".join(character if character == " " else self._normal(character) for character in text)
        if self._normal_hits.search(spelt) is None:
            spelt = self._normal(text)
        return self._normal_hits.sub(_broken_up, spelt)


def mapped(value: JsonValue, change: Callable[[str], str]) -> JsonValue:
    """A JSON value with every text in it changed, names of fields included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): mapped(inner, change) for name, inner in value.items()}
    if isinstance(value, Sequence):
        return [mapped(inner, change) for inner in value]
    return value


def _between(text: str, kept: re.Pattern[str], change: Callable[[str], str]) -> str:
    parts, position = [], 0
    for match in kept.finditer(text):
        parts += [change(text[position : match.start()]), match.group()]
        position = match.end()
    return "".join([*parts, change(text[position:])])


def _can_be_broken_up(word: str) -> bool:
    return len(word.strip(_BLANK)) > 1


def _broken_up(match: re.Match[str]) -> str:
    return f"{match.group()[0]} {match.group()[1:]}"


def _any_of(words: Iterable[str]) -> str:
    """A pattern that matches the longest of the words; never, where there are none."""
    return "|".join(map(re.escape, sorted(words, key=lambda word: (-len(word), word)))) or "(?!)"
