"""A run folder read back: complete, unfinished, damaged, hostile."""

import base64
import gzip
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mosaic_fast.cli import run_cli
from mosaic_fast.errors import UserError
from mosaic_fast.report.__main__ import main
from mosaic_fast.report.collect import collect_run, pack
from mosaic_fast.report.page import render_page
from mosaic_fast.report.read import Notes, read_groups, read_metrics, trajectory_files
from mosaic_fast.report.tree import group_tree, token_parts
from mosaic_fast.run.trajectories import CallRow, RewardRow, RolloutRow, StepRow
from tests.report.runs_for_tests import make_group, write_run, write_step

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror=hacked=1>"
    "<!--<script>\u202e\u0000\u2028\U0001f600]]>&lt;{{DATA}}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a")


def group_rows(folder: Path, step: int = 1) -> list[list[RolloutRow]]:
    return list(read_groups(folder / "trajectories" / f"step-{step:06d}.jsonl", Notes()))


def unpacked(packed: str):
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_a_complete_run_is_read_without_a_note(run: Path):
    data = collect_run(run, 100)
    assert data.notes == []
    assert len(data.rollouts) == 36
    assert [group.step for group in data.groups] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert data.metrics["step"] == [1, 2, 3]
    bodies = [body for chunk in data.chunks for body in unpacked(chunk)]
    assert len(bodies) == 9
    assert bodies[1]["rollouts"][2]["status"] == "refused"
    assert bodies[1]["preferences"][0] == [0.5, 0.5, 1, 1]
    assert bodies[1]["reasons"][0][2] == "task complete beats refused a task that should be done"
    assert "token_ids" not in bodies[0]["rollouts"][0]


def test_the_same_run_gives_the_same_page(run: Path):
    assert render_page([collect_run(run, 100)]) == render_page([collect_run(run, 100)])


def test_an_unfinished_run_is_shown_with_what_is_missing_named(run: Path, tmp_path: Path):
    """Killed while it wrote: no summary, half a last line of metrics, an unfinished trajectory file."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "summary.json").unlink()
    (folder / "config.toml").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4.0, "safety/harm')
    (folder / "trajectories" / ".tmp-step-000004.jsonl").write_text("{")
    data = collect_run(folder, 100)
    notes = "\n".join(data.notes)
    for named in ("no summary.json", "config.toml is missing", "metrics.jsonl, line 4 is incomplete"):
        assert named in notes
    assert len(data.rollouts) == 36
    assert render_page([data])


def test_broken_rows_are_left_out_by_name_and_the_rest_stays(run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "trajectories" / "step-000002.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[4])
    row["token_ids"] = [-5]
    lines[4] = json.dumps(row)
    del row["kind"]
    path.write_text("\n".join([lines[0][:200], *lines[1:5], json.dumps(row), "[1]", *lines[5:]]) + "\n")
    data = collect_run(folder, 100)
    notes = "\n".join(data.notes)
    assert "step-000002.jsonl, line 1 is incomplete" in notes
    assert "step-000002.jsonl, line 6 is left out: kind: Field required" in notes
    assert "step 2, group 1: no prefix tree" in notes
    assert len(data.rollouts) == 35
    body = unpacked(data.chunks[0])[3]
    assert body["preferences"] is None, "a matrix whose rows belong to missing members must not be shown"


def test_only_a_metrics_file_is_enough(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": NaN, "y": 2, "z": "text"}\n')
    assert read_metrics(tmp_path, Notes()) == {"step": [1.0], "y": [2.0]}
    assert "there are no trajectories" in collect_run(tmp_path, 10).notes


def test_metrics_of_earlier_versions_bear_their_present_names(tmp_path: Path):
    rows = [{"step": 1.0, "tree/plan_held": 1.0, "tree/held": 2.0}, {"step": 2.0, "tree/plan_kept": 0.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_metrics(tmp_path, Notes())
    assert found == {"step": [1.0, 2.0], "tree/plan_kept": [1.0, 0.0], "tree/kept_prefixes": [2.0, None]}


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UserError, match="no run folder"):
        collect_run(tmp_path / "none", 10)
    with pytest.raises(UserError, match="is not a run folder"):
        collect_run(tmp_path, 10)


def test_above_the_limit_whole_steps_are_left_out_evenly(tmp_path: Path):
    run = write_run(tmp_path / "long", steps=9, groups=1)
    data = collect_run(run, 12)
    assert [group.step for group in data.groups] == [1, 5, 9]
    assert "trajectories of 3 of 9 training steps" in data.notes[0]


def test_the_tree_covers_every_token_once_and_says_what_parts_its_branches(run: Path):
    group = group_rows(run)[1]
    tree = group_tree(group)
    trunk = tree[0]
    assert (trunk.parent, trunk.start, trunk.end, trunk.members) == (-1, 0, 6, (0, 1, 2, 3))
    for member, row in enumerate(group):
        path = [s for s in tree if member in s.members]
        assert [s.start for s in path[1:]] == [s.end for s in path[:-1]]
        assert path[-1].end == len(row.token_ids)
    checked = next(s for s in tree if s.members == (1, 2))
    assert (checked.step, checked.part) == (0, "check")
    assert checked.text.startswith("<safety_thoughts>no risk")
    distinct = {tuple(row.token_ids[: i + 1]) for row in group for i in range(len(row.token_ids))}
    assert sum(s.end - s.start for s in tree) == len(distinct)


def test_token_parts_add_up(run: Path):
    for group in group_rows(run):
        for row in group:
            assert sum(token_parts(row).values()) == len(row.token_ids)
    assert token_parts(group_rows(run)[0][1]) == {
        "prompt": 4,
        "plan": 2,
        "check": 3,
        "action": 4,
        "observation": 2,
    }


class Elements(HTMLParser):
    """What an HTML parser sees of a page: tags in order, and the attributes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_hostile_text_is_no_part_of_the_markup(tmp_path: Path):
    """However hostile the run, its page has exactly the elements of a harmless run's page."""
    pages = []
    for name, text in (("evil", HOSTILE), ("mild", " words")):
        folder = write_run(
            tmp_path / f"{name}</title><script>alert(1)<!-- {name}"[:40].replace("/", "%"), steps=1, text=text
        )
        pages.append(render_page([collect_run(folder, 100)]))
    evil, mild = (Elements() for _ in pages)
    evil.feed(pages[0])
    mild.feed(pages[1])
    assert evil.seen == mild.seen
    assert evil.open == []
    assert "hacked" not in pages[0]
    assert "onerror" not in pages[0]
    assert re.search(
        r"<script type=\"application/octet-stream\" id=\"chunk-0-0\">[A-Za-z0-9+/=]+</script>", pages[0]
    )


def test_the_page_allows_its_own_script_and_nothing_from_anywhere(run: Path):
    page = render_page([collect_run(run, 100)])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.findall(r"(?:src|href)=\"(?!#)", page)


def test_what_json_has_no_word_for_still_packs():
    """A NaN of an environment, half of a surrogate pair."""
    assert unpacked(pack({"a": [float("nan"), float("inf")], "b": "\ud800"})) == {
        "a": [None, None],
        "b": "\ud800",
    }


def test_the_command_writes_the_page_and_names_mistakes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        return run_cli(main)

    out = tmp_path / "page.html"
    assert command(str(run), str(run), "--out", str(out)) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert 'id="chunk-1-0"' in out.read_text()
    assert "36 trajectories" in capsys.readouterr().out
    for wrong, named in (
        ([str(tmp_path / "no")], "no run folder"),
        ([str(run), "--out", "/nowhere/x"], "cannot be written"),
        ([str(run), "--max-trajectories", "0"], "must be at least 1"),
    ):
        assert command(*wrong) == 2
        assert named in capsys.readouterr().err


def test_groups_of_the_fixture_are_what_the_trainer_writes(run: Path):
    """Not a test of itself: the reader's rows against the rollouts they were written from."""
    for rows, rollouts in zip(group_rows(run), [make_group(i) for i in range(3)], strict=True):
        for row, rollout in zip(rows, rollouts, strict=True):
            assert row.token_ids == rollout.token_ids.tolist()
            assert [s.plan for s in row.steps] == [s.plan for s in rollout.steps]
            assert row.harm == rollout.verdict.harm


def test_a_row_has_the_fields_of_the_schema_in_their_order(tmp_path: Path):
    """What training writes and what the report reads cannot part."""
    file = trajectory_files(write_run(tmp_path / "run", steps=1, groups=1))[0][1]
    row = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert list(row) == list(RolloutRow.model_fields)
    assert list(row["steps"][0]) == list(StepRow.model_fields)
    assert list(row["steps"][0]["call"]) == list(CallRow.model_fields)
    assert list(row["reward"]) == list(RewardRow.model_fields)


OLD_STEP = {"plan": None, "check": None, "action": "answer", "call": None, "answer": "hi", "text": "hi"}
OLD_ROW = {  # of the first version: no split, schemas, reasons, fork or figures of the engine
    **{"task_id": "train-0", "kind": "benign", "status": "answered", "group_id": 0, "done": True},
    "messages": [{"role": "user", "content": "greet"}],
    "steps": [OLD_STEP | {"span": [2, 4], "well_formed": True, "observation": None}],
    **{"token_ids": [1, 2, 3, 4], "trained": [2, 3], "advantage": 0.5, "a field of then": [1]},
    "reward": {"total": 1.0},
}


def test_a_users_own_part_of_the_reward_is_read_as_it_was_written(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=1, groups=1)
    write_step(folder, 1, [make_group(0)], {"brevity": 0.75})
    line = trajectory_files(folder)[0][1].read_text(encoding="utf-8").splitlines()[0]
    row = RolloutRow.model_validate_json(line)
    assert row.reward.model_dump() == json.loads(line)["reward"]
    assert row.reward.model_dump()["brevity"] == 0.75


def test_a_run_folder_of_an_earlier_version_opens(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=1, groups=1)
    rows = [OLD_ROW | {"rollout_id": 0}, OLD_ROW | {"rollout_id": 1, "token_ids": [1, 2, 3, 5]}]
    file = trajectory_files(folder)[0][1]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = collect_run(folder, 100)
    assert data.notes == []
    assert [(r.status, r.reward, r.generated_tokens) for r in data.rollouts] == [("answered", 1.0, 2)] * 2
    assert data.groups[0].request == "greet"


def test_damage_to_what_no_reader_needs_costs_no_row(tmp_path: Path):
    folder = write_run(tmp_path / "run", steps=1, groups=1)
    file = trajectory_files(folder)[0][1]
    damage = {"split": 1, "prompt_tokens": "many", "cached_tokens": None, "rollout_logprobs": {"a": 1}}
    rows = [json.loads(line) | damage for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [len(group) for group in group_rows(folder)] == [4]


def test_an_evaluation_has_the_page_too(tmp_path: Path):
    """Its episodes, a group a task; a line that is cut off is noted and left out."""
    outcome = {"kind": "injected", "status": "answered", "harm": True, "done": False, "details": {}}
    step = {"plan": "p", "check": None, "action": "answer", "answer": "a", "text": "t", "well_formed": True}
    row = {"suite": "world", "sample": 0, "task_id": "t", "outcome": outcome, "messages": [], "steps": [step]}
    rows = [
        {**row, "index": index, "attack": {"name": f"a{n}", "number": n}} for index in (0, 1) for n in (0, 1)
    ]
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (tmp_path / "outcomes.jsonl").write_text(text + '{"suite": "wor')
    run = collect_run(tmp_path, 100)
    assert len(run.groups) == 2
    assert [(entry.group, entry.place, entry.flags & 1) for entry in run.rollouts] == [
        (0, 0, 1),
        (0, 1, 1),
        (1, 0, 1),
        (1, 1, 1),
    ]
    assert len(run.notes) == 1
    assert "line 5 is incomplete" in run.notes[0]
