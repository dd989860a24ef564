"""A share of `make fuzz` in every run of the tests."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from mosaic_rollout.environments.agent_safetybench import read_cases
from mosaic_rollout.environments.sources import EnvironmentMissing
from tests.fuzz.subject import Subject, fuzz
from tests.fuzz.subjects import SUBJECTS


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_share_of_the_inputs(subject: Subject, tmp_path: Path):
    result = fuzz(subject, tmp_path / "fuzz", seed=1, inputs=range(round(300 * subject.share)))
    assert result.failures == []
    assert len(result.outcomes) > 1, "inputs that are all treated alike show nothing"


def test_a_case_that_names_an_environment_is_no_fault_of_its_file(tmp_path: Path):
    """Where the package of environments is not there, what helps is to install it: the file is not named."""
    case = {"id": 1, "instruction": "i", "environments": [{"name": "Email", "tools": []}], "fulfillable": 1}
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case]))
    if find_spec("asb_envs") is not None:
        assert [case.worlds[0].name for case in read_cases(path)] == ["Email"]
        return
    with pytest.raises(EnvironmentMissing, match="agent-safety-bench-envs is not installed; run `make"):
        read_cases(path)
