"""JSON that a model or a server wrote: read so that nothing in it can trip what comes after.

JSON Lines: where one ends, and what a user's may hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from mosaic_rollout.types import JsonValue

_DEEPEST = 64  # values within values; Python's own reader and writer give up at their stack's end
_BLANK = " \t\n\r"  # white space as JSON has it
_LARGEST = 2**63  # integers that some language's reader would round or refuse stay out, too


def read_json(text: str, *, unique_keys: bool = False) -> JsonValue:
    """The value of a JSON text. ValueError where it is none, or none that everybody can read.

    Refused: NaN and infinities (not JSON, though Python reads them), numbers beyond the range of a double or
    of 64 bits, nesting deeper than 64. Halves of surrogate pairs, which no UTF-8 can carry, become U+FFFD.
    unique_keys: refuse an object that has a key twice, of which a reader would take one or the other.

    >>> read_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    value, end = read_json_at(text, len(text) - len(text.lstrip(_BLANK)), unique_keys=unique_keys)
    if text[end:].strip(_BLANK):
        raise ValueError("there is more behind it")
    return value


def read_json_at(text: str, start: int, *, unique_keys: bool = False) -> tuple[JsonValue, int]:
    """The JSON value that begins at character `start`, and where it ends; what follows it is left alone.

    ValueError as of `read_json`. Takes time linear in the length of the text.

    >>> read_json_at('x = {"a": "</a>"}</a>', 4)
    ({'a': '</a>'}, 17)
    """
    try:
        value, end = (_UNIQUE if unique_keys else _ANY).raw_decode(text, start)
        return plain(value, unique_keys=unique_keys), end
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEEPEST}") from None


def check_plain(value: object) -> None:
    """ValueError for a value that `read_json` would not give: something is too deep, too large or NaN."""
    try:
        plain(value)
    except AttributeError:
        raise ValueError("a key is no text") from None


def without_surrogates(text: str) -> str:
    """A text with U+FFFD in place of lone surrogates: it can be encoded and tokenised."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain(value: object, depth: int = 0, *, unique_keys: bool = False) -> JsonValue:
    """A value of Python's lists, dicts and scalars, within the limits of `read_json`; else ValueError."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST}")
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [plain(inner, depth + 1, unique_keys=unique_keys) for inner in value]
    if isinstance(value, dict):
        found = {
            without_surrogates(key): plain(inner, depth + 1, unique_keys=unique_keys)
            for key, inner in value.items()
        }
        if unique_keys and len(found) != len(value):
            raise ValueError("two keys differ in what no UTF-8 can carry")
        return found
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise ValueError("a number is too large")
    return cast(JsonValue, value)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        found[key] = value
    return found


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


_ANY = json.JSONDecoder(parse_constant=_refuse)
_UNIQUE = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_once)


def json_lines(text: str) -> Iterator[tuple[int, str]]:
    """The non-empty lines of a text, with their numbers from 1.

    Only a line feed ends a line: other characters that `str.splitlines` breaks at (U+2028, U+0085) stand for
    themselves within a JSON text. A byte order mark in front is none of the first line.

    >>> list(json_lines('"a\\u2028b"\\n\\n2'))
    [(1, '"a\\u2028b"'), (3, '2')]
    """
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            yield number, line


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The non-empty lines of a file, with their numbers from 1. OSError and UnicodeDecodeError pass."""
    return list(json_lines(path.read_text(encoding="utf-8")))
