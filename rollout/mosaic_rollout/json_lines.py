"""JSON Lines: where one ends, and what a user's may hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


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
