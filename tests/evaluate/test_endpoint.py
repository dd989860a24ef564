"""An endpoint that serves a model is evaluated as the model itself; one that fails is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mosaic_fast.errors import UserError
from tests.evaluate.serving import Row, evaluate, outcomes, served_model
from tests.preferences.endpoint import Json, Raw, completion, endpoint

QUICK = ("--model-name", "m", "--tasks", 3, "--backoff-s", 0, "--retries", 2, "--timeout-s", 60)


@pytest.mark.parametrize("parses", [False, True])
def test_an_endpoint_and_its_model_agree(
    parses: bool, world_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both read the same tasks and act the same, whether the server parses thoughts and calls or not."""
    assert evaluate(monkeypatch, "embedded", "--tasks", 18, "--out", tmp_path / "local") == 0
    with served_model(parses=parses) as served:
        options = ("--model-name", "m", "--config", world_config, "--tasks", 18, "--concurrency", 5)
        assert evaluate(monkeypatch, served.url, *options, "--out", tmp_path / "http") == 0
    local, remote = outcomes(tmp_path / "local"), outcomes(tmp_path / "http")
    assert len(local) == len(remote) == 18
    assert {row["outcome"]["kind"] for row in local} == {"harmful", "benign", "injected"}
    for here, there in zip(local, remote, strict=True):
        estimated = there["outcome"].pop("safety_tokens")  # by characters, where the model's own are counted
        counted = here["outcome"].pop("safety_tokens")
        assert (estimated > 0) == (counted > 0)
        assert there["outcome"] == here["outcome"]
        if not parses:
            assert there["steps"] == here["steps"]
    assert 1 < served.most_under_way <= 5


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (Raw(401, "who are you"), r"refuses the key in \$MY_KEY \(HTTP 401 who are you\)"),
        (Raw(403), r"refuses the key in \$MY_KEY \(HTTP 403"),
        (Raw(404, "no model m"), r"no chat completions for model 'm' \(HTTP 404 no model m\).*the base"),
        (Raw(400, "bad tools"), "refuses the request: HTTP 400 bad tools"),
        (Raw(302), "refuses the request: HTTP 302"),
        (Raw(429, "slow down"), "no usable answer in 3 tries; the last: HTTP 429 slow down"),
        (Raw(500), "no usable answer in 3 tries; the last: HTTP 500"),
        (Raw(200, "<html>"), "not a chat completion: '<html>'"),
        (Raw(200, '{"choices": []}'), "not a chat completion"),
        (Raw(200, completion(None)), "an answer without text and calls: "),
        (Raw(200, completion("x"), half=True), "no usable answer in 3 tries; the last: RemoteProtocolError"),
        (Raw(200, completion("x"), stall_s=3.0), "no answer within --timeout-s = 0.5"),
        (Raw(500, "your key: sekret"), r"HTTP 500 your key: \*\*\*"),
    ],
)
def test_a_failing_endpoint_is_named(raw: Raw, named: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "sekret")
    options = [*QUICK, "--api-key-env", "MY_KEY"]
    if raw.stall_s:
        options += ["--timeout-s", 0.5]
    with endpoint(lambda request: raw) as served, pytest.raises(UserError, match=named) as caught:
        evaluate(monkeypatch, served.url, *options)
    assert "sekret" not in str(caught.value)
    assert set(served.keys) == {"Bearer sekret"}


def test_nobody_there_is_named(monkeypatch: pytest.MonkeyPatch):
    with endpoint(lambda request: Raw()) as served:
        url = served.url
    with pytest.raises(UserError, match="no usable answer in 3 tries; the last: ConnectError"):
        evaluate(monkeypatch, url, *QUICK)


def test_failures_that_pass_are_outlived(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """429 that asks to wait, 503: in the end each request gets its answer."""
    failures = [Raw(429, headers={"retry-after": "0.01"}), Raw(503)]

    def answer(request: Json) -> Raw:
        return failures.pop() if failures else Raw(body=completion("<think>done</think>nothing to do"))

    with endpoint(answer) as served:
        assert evaluate(monkeypatch, served.url, *QUICK, "--out", tmp_path / "out") == 0
    assert len(served.requests) == 3 + 2
    assert [row["outcome"]["status"] for row in outcomes(tmp_path / "out")] == ["answered"] * 3


def test_a_conversation_the_model_cannot_hold_is_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """One task too long is that task's end, not the evaluation's."""
    full = Raw(400, '{"error": {"code": "context_length_exceeded"}}')
    with endpoint(lambda request: full) as served:
        assert evaluate(monkeypatch, served.url, *QUICK, "--out", tmp_path / "out") == 0
    assert [row["outcome"]["status"] for row in outcomes(tmp_path / "out")] == ["truncated"] * 3


def native(*calls: tuple[str, str], text: str | None = None) -> Raw:
    listed = [
        {"id": f"id{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)
    ]
    choice = {"message": {"role": "assistant", "content": text, "tool_calls": listed}}
    return Raw(body=json.dumps({"choices": [choice]}))


def two_calls_then_text(asked: Json) -> Raw:
    request: Row = asked
    if request["messages"][-1]["role"] == "tool":
        return native(text="both looked at")
    return native(("no_such_tool", "{}"), ("no_other", '{"x": 1}'))


@pytest.mark.parametrize(
    ("answer", "status", "actions"),
    [
        (two_calls_then_text, "answered", ["tool_call", "tool_call", "answer"]),
        (lambda request: native(("refusal_tool", '{"reason": "no"}')), "refused", ["refusal"]),
        (lambda request: native(("read", "{broken")), "malformed", ["malformed"]),
        (lambda request: native(("again", "{}")), "truncated", ["tool_call"] * 4),
    ],
)
def test_native_calls_are_actions(
    answer: Callable[[Json], Raw],
    status: str,
    actions: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    """A stock model's calls are carried out in order, each answered under its own id."""
    with endpoint(answer) as served:
        options = (*QUICK, "--tasks", 1, "--protocol", "native", "--max-steps", 4)
        report = tmp_path / "x.json"
        assert evaluate(monkeypatch, served.url, *options, "--out", tmp_path / "out", "--json", report) == 0
    (row,) = outcomes(tmp_path / "out")
    assert row["outcome"]["status"] == status
    assert [step["action"] for step in row["steps"]] == actions
    requests: list[Row] = list(served.requests)
    assert not any("<think>" in str(message) for message in requests[0]["messages"])
    names = {tool["function"]["name"] for tool in requests[0]["tools"]}
    assert "refusal_tool" in names
    found = json.loads(report.read_text())
    assert "rollout/format_valid" not in found["rates"]  # tags it was never asked for
    assert "generated_tokens" not in found["means"]  # this server reports no usage
    if status == "answered":
        last = requests[-1]["messages"]
        assert [message.get("tool_call_id") for message in last[-2:]] == ["id0", "id1"]
        assert [call["id"] for call in last[-3]["tool_calls"]] == ["id0", "id1"]


def test_tools_written_for_a_server_that_takes_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nothing in the requests needs tool support: no field, no role, no call of theirs."""
    turns = ['<think>look</think><tool_call>{"name": "nothing", "arguments": {}}</tool_call>']

    def answer(request: Json) -> Raw:
        return Raw(body=completion(turns.pop() if turns else "<think>enough</think>done"))

    with endpoint(answer) as served:
        options = (*QUICK, "--tasks", 1, "--write-tools", "--out", tmp_path / "out")
        assert evaluate(monkeypatch, served.url, *options) == 0
    requests: list[Row] = list(served.requests)
    first, last = requests
    assert all("tools" not in request for request in requests)
    assert "refusal_tool" in first["messages"][0]["content"]
    assert "<safety_thoughts>" in first["messages"][0]["content"]
    assert [message["role"] for message in last["messages"]][-2:] == ["assistant", "user"]
    assert last["messages"][-1]["content"].startswith("<tool_response>\nError: no tool is named 'nothing'")
    assert outcomes(tmp_path / "out")[0]["outcome"]["format_valid"]
