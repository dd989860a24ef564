"""Which judge a configuration means, and what is said where it means none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from mosaic_fast.config import JudgeConfig
from mosaic_fast.errors import UserError
from mosaic_fast.preferences import RuleJudge, build_judge, judgement_figures
from mosaic_fast.preferences.judge import intransitive_triples
from mosaic_fast.preferences.llm_judge import LLMJudge
from tests.preferences.rollouts import saying

LLM = {"name": "llm", "endpoint": "http://localhost:1/v1", "model": "m"}


def test_rule_and_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert isinstance(build_judge(JudgeConfig(), tmp_path), RuleJudge)
    monkeypatch.setenv("JUDGE_KEY", "k")
    assert isinstance(build_judge(JudgeConfig(**LLM, api_key_env="JUDGE_KEY"), tmp_path), LLMJudge)
    assert not list(tmp_path.iterdir()), "nothing is written before the first question"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"name": "llm"}, "judge.name = 'llm' needs judge.endpoint"),
        ({"name": "llm", "endpoint": "http://x/v1"}, "judge.name = 'llm' needs judge.model"),
        ({**LLM, "endpoint": "localhost:30000"}, "judge.endpoint must look like http://"),
        ({**LLM, "endpoint": "https://me:key@host/v1"}, "no user or key in it"),
        ({"name": "gpt"}, "name"),
        ({"mode": "listwise"}, "mode"),
    ],
)
def test_a_mistake_is_named(values: dict[str, str], named: str):
    with pytest.raises(ValidationError, match=named):
        JudgeConfig.model_validate(values)


def test_a_key_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(
        UserError, match=r"judge\.api_key_env: the environment variable NO_SUCH_KEY is not set"
    ):
        build_judge(JudgeConfig(**LLM, api_key_env="NO_SUCH_KEY"), tmp_path)


MODULE = """
import numpy as np
from mosaic_fast.preferences import Judgement

class ByLength:
    def judge(self, groups):
        return [Judgement(self.one(group), {(0, 1): "shorter wins"}) for group in groups]
    def one(self, group):
        size = np.array([len(r.token_ids) for r in group])
        return (np.sign(size[None, :] - size[:, None]) + 1) / 2

class WrongShape(ByLength):
    def one(self, group): return np.zeros((1, 1))
class NotAPreference(ByLength):
    def one(self, group): return np.ones((len(group), len(group)))
class NotANumber(ByLength):
    def one(self, group): return np.full((len(group), len(group)), np.nan)
class TooFew(ByLength):
    def judge(self, groups): return []
class Scorer:
    def score_group(self, group): return [10.0 * r.rollout_id for r in group]
class BadScorer:
    def score_group(self, group): return [float("nan"), 1.0]
class Broken:
    def __init__(self): raise RuntimeError("no licence")
    def judge(self, groups): return []
class NoJudge:
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_judges.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ones_own_judge_is_found_in_the_working_directory(own: Path):
    judge = build_judge(JudgeConfig(name="own_judges:ByLength"), own)
    (judgement,) = judge.judge([[saying("a"), saying("b", 1)]])
    assert judgement.preferences.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert judgement.reason(1, 0) == "shorter wins"


def test_a_method_that_scores_a_group_is_enough(own: Path):
    judge = build_judge(JudgeConfig(name="own_judges:Scorer"), own)
    (judgement,) = judge.judge([[saying("a"), saying("b", 1), saying("c", 1)]])
    assert judgement.preferences.tolist() == [[0.5, 0, 0], [1, 0.5, 0.5], [1, 0.5, 0.5]]
    assert judgement.reason(0, 1) == "score 0 against 10"


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("own_judges:Nothing", "no class 'Nothing'; there are .*ByLength"),
        ("own_judges:NoJudge", "no method judge or score_group"),
        ("own_judges:Broken", r"Broken\(\) failed: RuntimeError: no licence"),
        ("no_such_module:X", "cannot import 'no_such_module'"),
    ],
)
def test_what_cannot_be_loaded_is_named(own: Path, name: str, named: str):
    with pytest.raises(UserError, match=named):
        build_judge(JudgeConfig(name=name), own)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("WrongShape", r"preferences \(1, 1\) for 2 rollouts; want \(2, 2\)"),
        ("NotAPreference", r"P\[i, j\] \+ P\[j, i\] = 1"),
        ("NotANumber", r"must be in \[0, 1\]"),
        ("TooFew", "0 judgements for 1 groups"),
        ("BadScorer", r"BadScorer\.score_group: want one number for each of 2 rollouts"),
    ],
)
def test_a_judgement_that_is_none_is_refused_before_it_is_paid(own: Path, name: str, named: str):
    with pytest.raises(UserError, match=named):
        build_judge(JudgeConfig(name=f"own_judges:{name}"), own).judge([[saying("a"), saying("b", 1)]])


def test_the_rule_judge_says_why():
    group = [saying("a", kind="benign"), saying("b", 1, kind="benign")]
    (judgement,) = RuleJudge().judge([group])
    assert judgement.reasons == {(0, 1): "tie: both task complete"}
    assert judgement_figures([judgement]) == {"judge/tie_frac": 1.0}


def test_cycles_are_counted_once():
    cycle = np.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
    order = np.array([[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]])
    assert intransitive_triples(cycle) == (1, 1)
    assert intransitive_triples(order) == (0, 1)
    assert intransitive_triples(np.full((5, 5), 0.5)) == (0, 10)
    assert intransitive_triples(np.full((2, 2), 0.5)) == (0, 0)
