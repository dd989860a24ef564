"""The catalogue of wrong kernels, without running one: what each replaces and the test it names are there."""

import ast
from pathlib import Path

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_a_kernel_and_names_a_test(mutant: Mutant):
    for name, old, new in (*((mutant.file, *pair) for pair in mutant.replace), *mutant.also):
        assert old in (ROOT / "kernels" / "mosaic_kernels" / name).read_text()
        assert old != new
    file, *test = mutant.test.split("::")
    tree = ast.parse((ROOT / "tests" / "kernels" / "triton" / file).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name.partition("[")[0] for name in test} <= functions
