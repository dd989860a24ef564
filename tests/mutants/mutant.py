"""What a mutant is."""

from dataclasses import dataclass

INTERPRETER, TTSEM = "interpreter", "ttsem"


@dataclass(frozen=True)
class Mutant:
    """A source replacement in a copy of the package, and the test that must fail on it."""

    name: str
    file: str  # in kernels/mosaic_kernels/
    replace: tuple[tuple[str, str], ...]  # (old, new): old occurs in the file, every occurrence is replaced
    layer: str  # INTERPRETER, or TTSEM: what only the compiled kernel's execution shows
    test: str  # pytest's node id, relative to tests/kernels/triton/
    also: tuple[tuple[str, str, str], ...] = ()  # (file, old, new) in other files
