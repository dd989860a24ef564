"""The LLM judge against a real HTTP server: what it makes of answers, and of everything that is none."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mosaic_fast.errors import TrainingError, UserError
from mosaic_fast.preferences import judgement_figures
from mosaic_fast.preferences.endpoint import Endpoint
from mosaic_fast.preferences.llm_calls import AnswerCache
from mosaic_fast.preferences.llm_judge import LLMJudge
from mosaic_fast.preferences.prompt import Mode
from tests.preferences.endpoint import Json, Raw, Served, completion, endpoint, shown
from tests.preferences.rollouts import plan_of, saying

KEY = "sk-very-secret"


def make_judge(
    served: Served,
    cache: Path,
    *,
    mode: Mode = "pairwise",
    retries: int = 2,
    timeout_s: float = 20.0,
    max_concurrent: int = 16,
    max_calls: int = 0,
    max_tokens_total: int = 0,
) -> LLMJudge:
    return LLMJudge(
        Endpoint(
            url=served.url,
            model="judge-model",
            api_key=KEY,
            api_key_env="JUDGE_KEY",
            max_tokens=256,
            timeout_s=timeout_s,
            retries=retries,
            backoff_s=0.0,
        ),
        AnswerCache(cache),
        mode=mode,
        max_concurrent=max_concurrent,
        max_calls=max_calls,
        max_tokens_total=max_tokens_total,
    )


def by_plan(better: Callable[[str, str], str]) -> Callable[[Json], Json]:
    """A judge that goes by the two plans."""

    def answer(request: Json) -> Json:
        data = shown(request)
        plans = plan_of(data["trajectory_1"]), plan_of(data["trajectory_2"])
        return {"reason": f"{plans[0]} against {plans[1]}", "winner": better(*plans)}

    return answer


def larger(a: str, b: str) -> str:
    return "1" if a > b else "2" if a < b else "tie"


def always(winner: str) -> Callable[[Json], Json]:
    return lambda request: {"reason": "so it is", "winner": winner}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "answers.sqlite"


def test_every_pair_is_asked_in_both_orders_and_decided(cache: Path):
    group = [saying(plan, i) for i, plan in enumerate("bca")]
    with endpoint(by_plan(larger)) as served:
        (judgement,) = make_judge(served, cache).judge([group])
    assert judgement.preferences.tolist() == [[0.5, 0, 1], [1, 0.5, 1], [0, 0, 0.5]]
    asked = {(plan_of(shown(r)["trajectory_1"]), plan_of(shown(r)["trajectory_2"])) for r in served.requests}
    assert asked == set(itertools.permutations("abc", 2))
    assert len(served.requests) == 6
    assert judgement.reason(1, 0) == "b against c (1 is #0, 2 is #1)"
    figures = judgement_figures([judgement])
    assert figures["judge/calls"] == 6
    assert figures["judge/flip_rate"] == 0
    assert figures["judge/prompt_tokens"] == 600
    assert figures["judge/intransitive_frac"] == 0


def test_the_request_is_what_openai_servers_expect(cache: Path):
    with endpoint(by_plan(larger)) as served:
        make_judge(served, cache).judge([[saying("a"), saying("b", 1)]])
    request = served.requests[0]
    assert request["model"] == "judge-model"
    assert request["temperature"] == 0.0
    form = request["response_format"]
    assert isinstance(form, dict)
    schema = form["json_schema"]["schema"]
    assert form["type"] == "json_schema"
    assert form["json_schema"]["strict"] is True
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["reason", "winner"]
    assert served.keys[0] == f"Bearer {KEY}"


@pytest.mark.parametrize("end", ["", "/", "/chat/completions", "/chat/completions/"])
def test_an_address_may_have_the_whole_path_already(cache: Path, end: str):
    with endpoint(by_plan(larger)) as served:
        served.url += end
        make_judge(served, cache).judge([[saying("a"), saying("b", 1)]])
    assert set(served.paths) == {"/v1/chat/completions"}


def test_a_judge_that_goes_by_position_decides_nothing(cache: Path):
    group = [saying(plan, i) for i, plan in enumerate("abc")]
    with endpoint(always("1")) as served:
        (judgement,) = make_judge(served, cache).judge([group])
    assert (judgement.preferences == 0.5).all()
    assert judgement_figures([judgement])["judge/flip_rate"] == 1
    assert judgement.reason(0, 1).startswith("tie: the two orders disagree. 1 is better: so it is")


def test_half_a_disagreement_is_a_tie_too(cache: Path):
    """A win in one order and a tie in the other."""
    with endpoint(by_plan(lambda a, b: "1" if a > b else "tie")) as served:
        (judgement,) = make_judge(served, cache).judge([[saying("a"), saying("b", 1)]])
    assert (judgement.preferences == 0.5).all()
    assert judgement.counts["flips"] == 1


def test_intransitive_triples_are_counted(cache: Path):
    beats = {"rock": "scissors", "scissors": "paper", "paper": "rock"}
    group = [saying(plan, i) for i, plan in enumerate([*beats, "rock"])]
    with endpoint(by_plan(lambda a, b: "1" if beats[a] == b else "2")) as served:
        (judgement,) = make_judge(served, cache).judge([group])
    assert judgement_figures([judgement])["judge/intransitive_frac"] == 0.5  # 2 of the 4 triples


def test_identical_rollouts_are_a_tie_and_equal_questions_are_asked_once(cache: Path):
    group = [saying("same", 0), saying("same", 1), saying("other", 2)]
    with endpoint(by_plan(larger)) as served:
        (judgement,) = make_judge(served, cache).judge([group])
    assert judgement.preferences[0, 1] == 0.5
    assert judgement.reason(0, 1) == "tie: the two are identical"
    assert judgement.preferences[0, 2] == judgement.preferences[1, 2] == 1
    assert len(served.requests) == 2


VALID = {"reason": "r", "winner": "1"}
FAILURES = {
    "not JSON": Raw(body="<html>busy</html>"),
    "not a completion": Raw(body="[1]"),
    "no choices": Raw(body='{"choices": []}'),
    "no text": Raw(body=completion(None)),
    "prose": Raw(body=completion("The first is better.")),
    "half a JSON object": Raw(body=completion('{"reason": "r", "win')),
    "a winner there is not": Raw(body=completion({"reason": "r", "winner": "3"})),
    "no reason": Raw(body=completion({"winner": "1"})),
    "two verdicts": Raw(body=completion('{"reason": "r", "winner": "1"} or {"reason": "r", "winner": "2"}')),
    "a thought without an end": Raw(body=completion('<think>{"reason": "r", "winner": "2"}, or')),
    "cut off": Raw(body=completion(VALID, finish_reason="length")),
    "too many requests": Raw(429, "slow down", {"retry-after": "0.01"}),
    "too early": Raw(425),
    "server error": Raw(500, "oops"),
    "no gateway": Raw(503, "", {"retry-after": "soon"}),
    "half an answer": Raw(body=completion(VALID), half=True),
    "silence": Raw(body=completion(VALID), stall_s=5.0),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_call_is_tried_again(cache: Path, failure: str):
    seen: set[str] = set()

    def fails_first(request: Json) -> Raw | Json:
        first = plan_of(shown(request)["trajectory_1"])
        again = first in seen
        seen.add(first)
        return by_plan(larger)(request) if again else FAILURES[failure]

    with endpoint(fails_first) as served:
        judge = make_judge(served, cache, timeout_s=2.5 if failure == "silence" else 60.0)
        (judgement,) = judge.judge([[saying("a"), saying("b", 1)]])
    assert judgement.preferences.tolist() == [[0.5, 0], [1, 0.5]]
    assert judgement.counts["retries"] == 2
    assert judgement.counts["calls"] == len(served.requests) == 4


@pytest.mark.parametrize("failure", ["prose", "a winner there is not", "server error", "half an answer"])
def test_after_the_last_try_the_run_stops_and_nothing_is_made_up(cache: Path, failure: str):
    with endpoint(lambda request: FAILURES[failure]) as served:
        judge = make_judge(served, cache, retries=2, max_concurrent=1)
        with pytest.raises(TrainingError, match=r"no valid answer in 3 tries.*No preference was made up"):
            judge.judge([[saying("a"), saying("b", 1)]])
    assert len(served.requests) == 3


def test_no_server_is_named(cache: Path):
    served = Served(url="http://127.0.0.1:9/v1")
    with pytest.raises(
        TrainingError, match=r"127\.0\.0\.1:9/v1 gave no valid answer in 3 tries; the last: Connect"
    ):
        make_judge(served, cache).judge([[saying("a"), saying("b", 1)]])


def test_a_refusal_of_the_server_stops_at_once_and_hides_the_key(cache: Path):
    """An endpoint may repeat the key it was given."""
    stops = pytest.raises(TrainingError, match=r"HTTP 401 invalid key \*\*\*.*judge\.api_key_env")
    with endpoint(lambda request: Raw(401, f"invalid key {KEY}")) as served, stops as error:
        make_judge(served, cache, max_concurrent=1).judge([[saying("a"), saying("b", 1)]])
    assert len(served.requests) == 1
    assert KEY not in str(error.value)


def test_a_key_no_header_can_carry_is_named(cache: Path):
    endpoint = Endpoint(
        url="http://127.0.0.1:9/v1", model="m", api_key="sek\nret", api_key_env="JUDGE_KEY", max_tokens=8
    )
    with pytest.raises(UserError, match=r"judge\.api_key_env: the key in \$JUDGE_KEY has") as error:
        LLMJudge(endpoint, AnswerCache(cache)).judge([[saying("a"), saying("b", 1)]])
    assert "sek" not in str(error.value)


def test_a_reasoning_model_may_think_aloud(cache: Path):
    thought = '<think>{"winner": "2"}? No.</think>\n\n{"reason": "r", "winner": "tie"}'
    with endpoint(lambda request: Raw(body=completion(thought))) as served:
        (judgement,) = make_judge(served, cache).judge([[saying("a"), saying("b", 1)]])
    assert judgement.preferences[0, 1] == 0.5
    assert judgement.counts["flips"] == 0


def test_what_was_answered_before_a_stop_is_never_asked_again(cache: Path):
    group = [saying(plan, i) for i, plan in enumerate("abcd")]
    answered = itertools.count()
    fails_soon = endpoint(lambda request: by_plan(larger)(request) if next(answered) < 5 else Raw(401))
    with fails_soon as served, pytest.raises(TrainingError):
        make_judge(served, cache, max_concurrent=1).judge([group])
    with endpoint(by_plan(larger)) as served:
        (judgement,) = make_judge(served, cache).judge([group])
        assert len(served.requests) == 12 - 5
        assert judgement.counts["cache_hits"] == 5
        (again,) = make_judge(served, cache).judge([group])
        assert len(served.requests) == 12 - 5
    assert (again.preferences == judgement.preferences).all()
    assert again.reasons == judgement.reasons


def test_a_file_that_is_no_cache_is_named(cache: Path):
    cache.write_text("something else, and longer than the header of a database" * 20)
    with (
        endpoint(by_plan(larger)) as served,
        pytest.raises(UserError, match=r"judge\.cache: .*answers\.sqlite"),
    ):
        make_judge(served, cache).judge([[saying("a"), saying("b", 1)]])


@pytest.mark.parametrize(
    ("calls", "tokens", "named"), [(3, 0, "max_calls = 3 calls"), (0, 330, "max_total_tokens = 330")]
)
def test_a_limit_stops_the_run_by_name(cache: Path, calls: int, tokens: int, named: str):
    """110 tokens a call: both limits allow three."""
    group = [saying(plan, i) for i, plan in enumerate("abc")]
    with endpoint(by_plan(larger)) as served, pytest.raises(TrainingError, match=named):
        make_judge(served, cache, max_concurrent=1, max_calls=calls, max_tokens_total=tokens).judge([group])
    assert len(served.requests) == 3


def test_calls_under_way_are_bounded_over_all_groups(cache: Path):
    groups = [[saying(f"{g}{i}", i) for i in range(3)] for g in range(3)]
    slow = by_plan(larger)
    with endpoint(lambda request: Raw(body=completion(slow(request)), stall_s=0.02)) as served:
        judgements = make_judge(served, cache, max_concurrent=3).judge(groups)
    assert served.most_under_way == 3
    assert all(j.preferences.tolist() == [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]] for j in judgements)


def test_pointwise_asks_once_a_rollout_and_pays_the_score(cache: Path):
    scores = {"a": 2, "b": 10, "c": 5}
    group = [saying(plan, i) for i, plan in enumerate("abc")]

    def score(request: Json) -> Json:
        return {"reason": "r", "score": scores[plan_of(shown(request)["trajectory"])]}

    with endpoint(score) as served:
        (judgement,) = make_judge(served, cache, mode="pointwise").judge([group])
    assert len(served.requests) == 3
    align = judgement.preferences.sum(axis=1) - 0.5
    assert np.allclose(
        np.diff(align), 3 / 2 * np.diff([0.2, 1.0, 0.5])
    )  # G / 2 times the score, plus a constant
    assert np.allclose(judgement.preferences + judgement.preferences.T, 1)
    assert judgement.reason(0, 1) == "2 against 10 of 10. #0: r #1: r"
