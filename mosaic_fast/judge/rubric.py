"""By what an LLM judge goes: a prompt of ours by its version, or a Markdown file of the user's own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from mosaic_fast.errors import UserError

Mode = Literal["pairwise", "pointwise"]

KEPT = "judge-prompt.md"
"""The copy of a user's rubric in the run folder."""


@dataclass(frozen=True)
class Rubric:
    """`name`: as the configuration has it. `text`: of a user's file; None: a version of ours."""

    name: str
    text: str | None = None

    def system(self, mode: Mode) -> str:
        """The system message. A user's text is followed by what is shown, and by the answer's form."""
        if self.text is None:
            return prompt_text(f"{mode}_{self.name}")
        return f"{self.text.strip()}\n\n{prompt_text(f'own_{mode}_v1')}"

    def sha256(self, mode: Mode) -> str:
        """The hash of the user's file, as `sha256sum` prints it; of our system message where it is ours."""
        text = self.system(mode) if self.text is None else self.text
        return hashlib.sha256(text.encode("utf-8")).hexdigest()


def load_rubric(name: str, run_folder: Path | None = None) -> Rubric:
    """The rubric that `judge.prompt` names. UserError for a file that is missing, empty or no text.

    run_folder: of a run that may have a copy already: its file may be gone by now, but not have changed.
    """
    if not name.endswith(".md"):
        return Rubric(name)
    copy = run_folder / KEPT if run_folder is not None else None
    kept = _read(copy) if copy is not None and copy.is_file() else None
    if kept is not None and not Path(name).exists():
        return Rubric(name, kept)
    text = _read(Path(name))
    if not text.strip():
        raise UserError(f"judge.prompt: {name} is empty; write what makes a trajectory better into it")
    if kept is not None and kept != text:
        raise UserError(
            f"judge.prompt: {name} has changed since the run began; its first text is {copy}. Put it back to "
            "go on, or start a new run"
        )
    return Rubric(name, text)


def prompt_text(name: str) -> str:
    """A prompt of ours, by the name of its file."""
    path = files("mosaic_fast.judge").joinpath("prompts", f"{name}.md")
    return path.read_text(encoding="utf-8").strip()


def _read(path: Path) -> str:
    """As it is, line ends included: its hash is that of the file."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"judge.prompt: there is no file {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"judge.prompt: {path} is not text in UTF-8") from None
    except OSError as error:
        raise UserError(f"judge.prompt: {path} cannot be read: {error.strerror}") from None
