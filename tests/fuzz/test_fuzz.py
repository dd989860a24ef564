"""A share of `make fuzz` in every run of the tests."""

from pathlib import Path

import pytest

from .subject import Subject, fuzz
from .subjects import SUBJECTS


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_share_of_the_inputs(subject: Subject, tmp_path: Path):
    result = fuzz(subject, tmp_path / "fuzz", seed=1, inputs=range(round(300 * subject.share)))
    assert result.failures == []
    assert len(result.outcomes) > 1, "inputs that are all treated alike show nothing"
