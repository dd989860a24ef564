"""An evaluation on disk: what was asked, and one line a finished episode, so that it can go on."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TextIO

from pydantic import TypeAdapter

from mosaic_fast.errors import UserError
from mosaic_fast.preferences.episode_counts import EpisodeCounts


@dataclass(frozen=True, order=True)
class Key:
    """Which episode of an evaluation."""

    suite: str
    index: int  # of the task in the suite's draw
    sample: int
    attack: int = 0  # its number among the attacks on the task, one after the other


@dataclass(frozen=True)
class Finished:
    """A finished episode: its task, its figures, and its course for readers."""

    task_id: str
    outcome: EpisodeCounts
    course: Mapping[str, object]


_NAMED, _FIRST = ("suite", "index", "sample"), {"number": 0}
"""Of a key, what a row has by name; the attack's number stands beside its name."""
_KEY, _OUTCOME = TypeAdapter(Key), TypeAdapter(EpisodeCounts)


class Store:
    """The folder of an evaluation, locked while it is open. Each episode is on disk when `add` returns.

    settings: what the episodes depend on. A folder of other settings is refused, naming every difference.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object]) -> None:
        self.folder, self._settings = folder, json.loads(json.dumps(settings))
        self.finished: dict[Key, Finished] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> Store:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out: {self.folder} is a file; name a folder")
        settings = self.folder / "settings.json"
        try:
            if self.folder.is_dir() and not settings.is_file() and any(self.folder.iterdir()):
                raise UserError(f"--out: {self.folder} holds something else; name a new folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / "outcomes.jsonl").open(
                "a+", encoding="utf-8", errors="surrogateescape"
            )
            self._lock(self._file)
            if settings.is_file():
                self._refuse_differences(settings)
            else:
                unfinished = self.folder / "settings.json.tmp"
                unfinished.write_text(json.dumps(self._settings, indent=1) + "\n", encoding="utf-8")
                unfinished.replace(settings)
            self._read(self._file)
        except OSError as error:
            self.close()
            raise UserError(f"--out: {self.folder} cannot be used: {error.strerror or error}") from None
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, key: Key, episode: Finished) -> None:
        """Keep an episode for good."""
        if self._file is None:
            raise RuntimeError("the store is closed")
        row = {
            **{name: getattr(key, name) for name in _NAMED},
            "task_id": episode.task_id,
            "outcome": asdict(episode.outcome),
        }
        try:
            self._file.write(json.dumps({**row, **episode.course}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"--out: {self.folder} cannot be written: {error.strerror or error}. What is in it is "
                "kept; make room and repeat the command"
            ) from None
        self.finished[key] = episode

    def keep_asked(self, asked: Mapping[str, object]) -> Mapping[str, object]:
        """Keep how servers were asked otherwise than the settings say; returns all that is kept of it."""
        path = self.folder / "asked.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if asked:
                known |= json.loads(json.dumps(asked))
                path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--out: {path} cannot be used: {error}") from None
        return known

    def _lock(self, file: TextIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out: another evaluation is writing {self.folder}") from None

    def _refuse_differences(self, path: Path) -> None:
        try:
            before = _flat(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError):
            raise UserError(f"--out: {path} is damaged; name a new folder") from None
        now = _flat(self._settings)
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            lines = [
                f"  {name}: it has {before.get(name)!r}, you ask for {now.get(name)!r}" for name in changed
            ]
            raise UserError(
                f"--out: {self.folder} is another evaluation; these differ:\n"
                + "\n".join(lines)
                + "\nrepeat its own command to go on with it, or name a new folder"
            )

    def _read(self, file: TextIO) -> None:
        """Read every complete line, and cut off a last one that a crash has left incomplete."""
        file.seek(0)
        complete = 0
        for number, line in enumerate(iter(file.readline, ""), start=1):
            if not line.endswith("\n"):
                break
            try:
                line.encode()  # bytes that are no UTF-8 were let through until here, to name their line
                row = json.loads(line)
                key = _KEY.validate_python(
                    {name: row[name] for name in _NAMED} | {"attack": row.get("attack", _FIRST)["number"]}
                )
                course = {name: row[name] for name in ("messages", "steps", "tools", "attack") if name in row}
                self.finished[key] = Finished(str(row["task_id"]), _outcome(row["outcome"]), course)
            except (ValueError, LookupError, TypeError, RecursionError):
                raise UserError(
                    f"--out: line {number} of {file.name} is damaged; name a new folder"
                ) from None
            complete = file.tell()
        file.truncate(complete)


def kept_date(folder: Path) -> str | None:
    """The date that an evaluation in a folder was begun with; None where there is none."""
    try:
        date = str(json.loads((folder / "settings.json").read_text(encoding="utf-8"))["date"])
        datetime.date.fromisoformat(date)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None  # what is wrong with the folder is said where it is opened
    return date


def _outcome(figures: Mapping[str, object]) -> EpisodeCounts:
    """The figures of an episode from its row. ValueError or TypeError where they are none."""
    names = {field.name for field in fields(EpisodeCounts)}
    if set(figures) != names:
        raise ValueError(f"an outcome has {', '.join(sorted(names))}")
    return _OUTCOME.validate_json(json.dumps(figures), strict=True)


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted name."""
    if isinstance(value, Mapping):
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}
