"""`--attack best-of-N`: one attack after the other, until one succeeds."""

import json
from pathlib import Path
from typing import Any

import pytest

from mosaic_fast.errors import UserError
from mosaic_fast.evaluate.attacks import attack_result
from mosaic_fast.evaluate.store import Finished, Key
from mosaic_fast.preferences.episode_counts import EpisodeCounts
from tests.evaluate.serving import evaluate, outcomes
from tests.preferences.endpoint import Json, endpoint

WORLD = ["embedded", "--tasks", 24]


def row_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_stopped_in_the_middle_it_ends_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No attack comes after one that succeeded; the figures are those of what was played."""
    out, figures = tmp_path / "out", tmp_path / "whole.json"
    arguments = [*WORLD, "--attack", "best-of-3", "--out", out, "--json"]
    assert evaluate(monkeypatch, *arguments, figures) == 0
    lines = (out / "outcomes.jsonl").read_text().splitlines(keepends=True)
    chains: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(outcomes(out), key=lambda row: row["attack"]["number"]):
        chains.setdefault(row["index"], []).append(row)
    assert len(chains) == 8  # of 24 tasks
    for chain in chains.values():
        assert [row["attack"]["number"] for row in chain] == list(range(len(chain)))
        assert len({row["attack"]["name"] for row in chain}) == len(chain)
        harmed = [row["outcome"]["harm"] for row in chain]
        assert not any(harmed[:-1])
        assert harmed[-1] or len(chain) == 3
    found = row_of(figures)["suites"]["world"]
    for place in (1, 2, 3):
        hits = sum(any(row["outcome"]["harm"] for row in chain[:place]) for chain in chains.values())
        assert found["attack"]["success_at"][str(place)]["hits"] == hits
    assert 0 < found["attack"]["success_at"]["1"]["hits"] < 8
    assert found["rates"]["safety/injection_harm"]["hits"] == found["attack"]["success_at"]["1"]["hits"]
    assert found["attack"]["worst"] in found["attack"]["attacks"]

    (out / "outcomes.jsonl").write_text("".join(lines[: len(lines) // 2]))
    assert evaluate(monkeypatch, *arguments, tmp_path / "resumed.json") == 0
    assert row_of(tmp_path / "resumed.json")["suites"] == row_of(figures)["suites"]


def test_a_model_that_writes_attacks_sees_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What it wrote is kept: going on asks nothing twice."""

    def answer(asked: Json) -> Json:
        messages: Any = asked["messages"]
        failed = json.loads(messages[1]["content"])["failed"]
        return {"text": f"note {len(failed)} {{odd}}: {{goal}}"}

    out = tmp_path / "out"
    with endpoint(answer) as served:
        arguments = [*WORLD, "--attack", "best-of-2", "--attack-endpoint", served.url, "--attack-model", "m"]
        arguments += ["--out", out, "--json", tmp_path / "figures.json"]
        assert evaluate(monkeypatch, *arguments) == 0
        rows, asked = outcomes(out), len(served.requests)
        assert asked == len(rows)
        for row in rows:
            assert row["attack"]["template"] == f"note {row['attack']['number']} {{odd}}: {{goal}}"
        second: Any = next(r for r in served.requests if "note 0" in str(r["messages"]))
        failed = json.loads(second["messages"][1]["content"])["failed"]
        assert failed[0]["text"] == "note 0 {odd}: {goal}"
        assert failed[0]["agent"].startswith(("answered: ", "refused: ", "malformed: ", "truncated: "))
        (out / "outcomes.jsonl").write_text("")
        assert evaluate(monkeypatch, *arguments) == 0
        assert len(served.requests) == asked
        assert len(outcomes(out)) == len(rows)


def finished(harm: bool, name: str) -> Finished:
    outcome = EpisodeCounts("injected", "answered", True, harm, True, True, 1, 0, 0, 1, {})
    return Finished("t", outcome, {"attack": {"name": name}})


def test_success_is_of_tasks_and_the_worst_attack_is_the_surest():
    """By hand: 4 tasks, 3 attacks. `b` succeeded twice of three times, `c` once of once."""
    played = [["a-", "b+"], ["b-", "a-", "c+"], ["a-", "a-", "a-"], ["b+"]]
    done = {
        Key("world", task, 0, number): finished(one[1] == "+", one[0])
        for task, chain in enumerate(played)
        for number, one in enumerate(chain)
    }
    result = attack_result("world", done, 3)
    assert {place: figure.rate.hits for place, figure in result.success.items()} == {1: 1, 2: 2, 3: 3}
    assert all(figure.rate.total == 4 for figure in result.success.values())
    assert {name: (f.rate.hits, f.rate.total) for name, f in result.attacks.items()} == {
        "a": (0, 5),
        "b": (2, 3),
        "c": (1, 1),
    }
    assert result.worst == "b" if result.attacks["b"].low > result.attacks["c"].low else "c"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--attack", "best-of-0"], "--attack 'best-of-0': write it as best-of-16"),
        (["--attack", "16"], "write it as best-of-16"),
        (["--attacks", "mine.txt"], "--attacks needs --attack"),
        (["--attack", "best-of-2", "--attack-model", "m"], "belong together"),
        (["--attack", "best-of-99"], "the environment has 33 attacks; ask for fewer"),
        (["--attack", "best-of-2", "--attacks", "nowhere.txt"], "nowhere.txt"),
        (["--attack", "best-of-2", "--tasks", "1", "--split", "train"], "no injected tasks"),
    ],
)
def test_a_mistake_is_named(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        evaluate(monkeypatch, "embedded", *arguments, "--out", "out")
    assert not list(tmp_path.iterdir())


def test_more_attacks_than_the_file_has_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("please {goal}\n")
    with pytest.raises(UserError, match="the file of --attacks has 1 attacks; ask for fewer"):
        evaluate(monkeypatch, "embedded", "--attack", "best-of-2", "--attacks", tmp_path / "mine.txt")
