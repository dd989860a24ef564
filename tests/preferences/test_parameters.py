"""A request as a server takes it: what it refuses by name is renamed or left out, once, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mosaic_fast.errors import TrainingError, UserError
from mosaic_fast.preferences.endpoint import Endpoint
from mosaic_fast.preferences.llm_calls import AnswerCache
from mosaic_fast.preferences.llm_judge import LLMJudge
from mosaic_rollout.endpoint.parameters import Parameters
from tests.evaluate.serving import evaluate
from tests.preferences.endpoint import Json, Raw, Served, completion, endpoint
from tests.preferences.rollouts import saying

ANSWER: Json = {"reason": "r", "winner": "tie"}


def openai(name: str, what: str = "is not supported with this model.", **more: str) -> Raw:
    error = {"message": f"Unsupported parameter: '{name}' {what}", "param": name, "code": None, **more}
    return Raw(400, json.dumps({"error": error}))


def refusing(**refused: Raw) -> Callable[[Json], Raw | Json]:
    """A server that refuses each parameter in its own words; `json_schema` is a kind of response_format."""

    def answer(request: Json) -> Raw | Json:
        form = request.get("response_format")
        there = {*request, form["type"] if isinstance(form, dict) else ""}
        return next((raw for name, raw in refused.items() if name in there), ANSWER)

    return answer


def judge_of(served: Served, cache: Path, said: list[str], given: tuple[str, ...] = ()) -> LLMJudge:
    where = {"url": served.url, "model": "m", "api_key": None, "api_key_env": None}
    patience = {"max_tokens": 99, "retries": 0, "backoff_s": 0.0, "parameters": Parameters(given)}
    return LLMJudge(Endpoint(**where, **patience, say=said.append), AnswerCache(cache))


@pytest.mark.parametrize(
    ("refused", "sent"),
    [
        (
            {
                "max_tokens": openai("max_tokens", "is not supported. Use 'max_completion_tokens' instead."),
                "temperature": openai("temperature", "does not support 0, only the default (1)"),
            },
            {"max_completion_tokens": 99, "response_format": "json_schema"},
        ),
        (
            {"json_schema": Raw(400, '{"error": {"message": "This response_format is unavailable now"}}')},
            {"temperature": 0.0, "max_tokens": 99, "response_format": "json_object"},
        ),
        (
            {
                "json_schema": openai("response_format.type", "must be text or json_object"),
                "json_object": Raw(422, '{"detail": [{"loc": ["body", "response_format"], "msg": "extra"}]}'),
            },
            {"temperature": 0.0, "max_tokens": 99},
        ),
        (
            {"temperature": Raw(400, '{"object": "error", "message": "unknown field temperature"}')},
            {"max_tokens": 99, "response_format": "json_schema"},
        ),
        (
            {"temperature": Raw(400, "no temperature here")},
            {"max_tokens": 99, "response_format": "json_schema"},
        ),
    ],
)
def test_what_a_server_refuses_is_asked_otherwise(tmp_path: Path, refused: dict[str, Raw], sent: Json):
    said: list[str] = []
    with endpoint(refusing(**refused)) as served:
        judge = judge_of(served, tmp_path / "a", said)
        judge.probe()
        assert len(served.requests) == 1 + len(refused)
        judge.judge([[saying("a"), saying("b", 1)], [saying("c"), saying("d", 1)]])
        assert len(served.requests) == 1 + len(refused) + 4, "remembered"
        assert judge.record()["asked_with"] == sent
        assert len(said) == len(refused)
        again = judge_of(served, tmp_path / "a", said)
        again.probe()
        count = len(served.requests)
        (judgement,) = again.judge([[saying("a"), saying("b", 1)]])
        assert len(served.requests) == count
        assert judgement.counts["cache_hits"] == 2, "answers are kept as what was really asked"


def test_many_refused_at_once_change_it_once(tmp_path: Path):
    """Without a first question, sixteen requests are under way with the parameter."""
    said: list[str] = []
    refused = openai("max_tokens")
    with endpoint(refusing(max_tokens=Raw(400, refused.body, stall_s=0.05))) as served:
        judge_of(served, tmp_path / "a", said).judge([[saying(str(i), i) for i in range(4)]])
    assert len(said) == 1
    assert "max_tokens as max_completion_tokens from now on: the server says" in said[0]


@pytest.mark.parametrize(
    "raw",
    [
        openai("temperature", "must be between 0 and 1", code="invalid_value"),
        Raw(400, '{"error": {"message": "max_tokens is too large: 99. The model supports at most 9"}}'),
        Raw(
            400, '{"error": {"message": "maximum context length is 9, max_tokens 99", "param": "max_tokens"}}'
        ),
        Raw(400, '{"error": {"message": "messages: too many"}, "request": {"temperature": 0}}'),
        Raw(401, '{"error": {"message": "no temperature for you"}}'),
    ],
)
def test_what_another_request_does_not_mend_is_named(tmp_path: Path, raw: Raw):
    said: list[str] = []
    with endpoint(lambda request: raw) as served, pytest.raises(TrainingError, match=f"HTTP {raw.status}"):
        judge_of(served, tmp_path / "a", said).probe()
    assert (len(served.requests), said) == (1, [])


def test_a_server_that_refuses_everything_ends_it(tmp_path: Path):
    said: list[str] = []
    with (
        endpoint(
            lambda r: openai("max_completion_tokens" if "max_tokens" not in r else "max_tokens")
        ) as served,
        pytest.raises(TrainingError, match="max_completion_tokens"),
    ):
        judge_of(served, tmp_path / "a", said).probe()
    assert len(served.requests) == 2


def test_the_users_own_names_are_sent_from_the_start(tmp_path: Path):
    given = ("max_tokens=max_output_tokens", "temperature=", "response_format=json_object")
    with endpoint(lambda request: ANSWER) as served:
        judge_of(served, tmp_path / "a", [], given).probe()
    request = served.requests[0]
    assert {key: value for key, value in request.items() if key not in ("messages", "model")} == {
        "max_output_tokens": 99,
        "response_format": {"type": "json_object"},
    }


def test_an_answer_is_none_to_the_same_question_asked_otherwise(tmp_path: Path):
    """Without a temperature a model may say something else: it is not answered from the other's cache."""
    group = [[saying("a"), saying("b", 1)]]
    with endpoint(lambda request: ANSWER) as served:
        for given, asked in (((), 2), (("temperature=",), 4), ((), 4), (("temperature=",), 4)):
            judge_of(served, tmp_path / "a", [], given).judge(group)
            assert len(served.requests) == asked


@pytest.mark.parametrize("change", ["tools=", "temperature", "max_tokens=a b", "response_format=xml", "=x"])
def test_a_change_that_is_none_is_named(change: str):
    with pytest.raises(UserError, match=r"NAME=OTHER|json_object, or be left out"):
        Parameters([change])


def test_a_policy_behind_a_url_is_asked_likewise_and_the_figures_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def answer(request: Json) -> Raw:
        for name in ("max_tokens", "temperature"):
            if name in request:
                return openai(name)
        return Raw(body=completion("<think>enough</think>done"))

    options = ("--model-name", "m", "--tasks", 2, "--concurrency", 1, "--out", tmp_path / "out")
    with endpoint(answer) as served:
        for file in (tmp_path / "first.json", tmp_path / "again.json"):
            assert evaluate(monkeypatch, served.url, *options, "--json", file) == 0
            found = json.loads(file.read_text())["asked_differently"]
            assert found == {"endpoint": ["max_tokens as max_completion_tokens", "temperature left out"]}
        assert len(served.requests) == 2 + 2
