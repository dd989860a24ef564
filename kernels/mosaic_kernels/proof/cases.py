"""The compile cases of every op: one for each kernel, tile and architecture."""

import importlib
from collections.abc import Iterator

from mosaic_kernels.compile_case import CompileCase

# Modules with `compile_cases() -> Iterator[CompileCase]`.
CASE_MODULES = (
    "mosaic_kernels.attention.cases",
    "mosaic_kernels.logprob.cases",
    "mosaic_kernels.preference.cases",
    "mosaic_kernels.surrogate.cases",
)


def all_cases(arch: str | None = None, holding: str = "") -> list[CompileCase]:
    """The cases of every op, in a fixed order; of one architecture, with this text in their names."""
    cases: list[CompileCase] = []
    for name in CASE_MODULES:
        made: Iterator[CompileCase] = importlib.import_module(name).compile_cases()
        cases += [case for case in made if arch in (None, case.arch) and holding in case.name]
    return cases
