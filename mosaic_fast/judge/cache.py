"""Answers of an LLM judge on disk: each is kept the moment it arrives, so a killed run asks nothing twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mosaic_fast.errors import UserError


class AnswerCache:
    """A SQLite file, key -> answer, opened at first use. Several runs may share one.

    UserError where the file is no such thing or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def get(self, key: str) -> str | None:
        with self._named_errors():
            row = self._open().execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, answer: str) -> None:
        """Kept for good when this returns: each answer is a transaction of its own."""
        with self._named_errors():
            self._open().execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self._path, timeout=60.0, isolation_level=None)
            database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
            self._database = database
        return self._database

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"judge.cache: {self._path} cannot be used: {error}. Free some space, or name another file"
            ) from None


def answer_key(*parts: str) -> str:
    """The key of a question: a hash of all that decides its answer."""
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()
