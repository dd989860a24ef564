"""What `[env]` refuses, and what it says then."""

import pytest
from pydantic import ValidationError

from mosaic_fast.config import ENVIRONMENTS, EVALUATION_ONLY, Config, EnvConfig


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "agentdoj"}, "none of world, agentdojo"),
        ({"name": "bank:"}, "bank:Bank for the class Bank"),
        ({"name": "world", "tasks": "x.jsonl"}, r"env\.tasks belongs to"),
        ({"name": "agent_safetybench"}, r"needs env\.tasks, its released_data\.json"),
        ({"name": "world", "suites": ["a"]}, r"env\.suites belongs to agentdojo, bfcl, asb"),
        ({"name": "bank:Bank", "heldout_suites": ["a"]}, r"env\.heldout_suites belongs to"),
        ({"name": "bfcl", "attack": "prompt"}, r"env\.attack belongs to agentdojo and asb"),
    ],
)
def test_what_does_not_fit_the_name_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        EnvConfig.model_validate(values)


def test_every_known_name_and_ones_own_are_accepted() -> None:
    for name in (*ENVIRONMENTS, "bank:Bank", "a.b_c:D1"):
        tasks = "cases.json" if name in ("agent_safetybench", *EVALUATION_ONLY) else None
        assert EnvConfig(name=name, tasks=tasks).name == name


def test_cases_without_verdicts_need_a_judge() -> None:
    with pytest.raises(ValidationError, match="finds nothing but ties"):
        Config(env=EnvConfig(name="agent_safetybench", tasks="cases.json"))
