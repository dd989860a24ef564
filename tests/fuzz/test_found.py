"""Inputs that once ended in a traceback, by fuzzing or by reading the code for more of the kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mosaic_fast.config.read import load_config
from mosaic_fast.evaluate.store import Finished, Key, Store
from mosaic_fast.learner.checkpoint import verify_checkpoint
from mosaic_fast.learner.execution.cost import load_cost_model
from mosaic_fast.policy.folder import read_config, weight_files
from mosaic_fast.policy.support import check_family
from mosaic_fast.report.collect import collect_run
from mosaic_rollout.endpoint.server import certificates
from mosaic_rollout.environments.custom.rows import read_rows
from mosaic_rollout.errors import UserError
from tests.fuzz.kept import _OUTCOME, _SETTINGS

LONG, DEEP = "9" * 5000, "[" * 100_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"seed = {LONG}", "not valid TOML"),
        (f"seed = {DEEP}", "nested too deep"),
        (f"seed = 0x{'f' * 9000}", "seed = a value too long to show"),
        (f"[seed.{'x.' * 1500}y]\nz = 1", "seed = a value too long to show"),
        (f'seed = "{"x" * 9000}"', r"seed = 'x{299}\.\.\.:"),
        (
            "[model]\nthreads = 99999999999",
            r"model\.threads = 99999999999: Input should be less",
        ),
    ],
)
def test_a_configuration_file(tmp_path: Path, content: str, said: str):
    path = tmp_path / "run.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        load_config(path)


@pytest.mark.parametrize("value", [LONG, "9" * 400, DEEP, "nan"])
def test_a_cost_model(tmp_path: Path, value: str):
    path = tmp_path / "cost.toml"
    path.write_text(
        f"[seconds_per_unit]\nlinear = {value}\nattention = 1\nhead = 1\nlayer_calls = 1\nheld = 1\n"
    )
    with pytest.raises(UserError, match=str(path)):
        load_cost_model(str(path))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: b"\xff" + line,
        lambda line: DEEP.encode() + b"\n",
        lambda line: line.replace(b'"harm": false', b'"harm": "no"'),
        lambda line: line.replace(b'"index": 1', b'"index": "1st"'),
        lambda line: line.replace(b'"status": "answered"', b'"status": "asleep"'),
        lambda line: line.replace(b'"steps": 2', b'"steps": null'),
    ],
    ids=["bytes", "deep", "harm", "index", "status", "count"],
)
def test_an_evaluation(tmp_path: Path, spoil: Callable[[bytes], bytes]):
    with Store(tmp_path / "out", _SETTINGS) as store:
        for index in range(3):
            store.add(Key("a", index, 0), Finished("t", _OUTCOME, {"messages": [], "steps": []}))
    path = tmp_path / "out" / "outcomes.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert spoil(lines[1]) != lines[1]
    path.write_bytes(lines[0] + spoil(lines[1]) + lines[2])
    with (
        pytest.raises(UserError, match=r"line 2 of .*outcomes\.jsonl is damaged"),
        Store(tmp_path / "out", _SETTINGS),
    ):
        pass
    (tmp_path / "out" / "settings.json").write_text(DEEP)
    with pytest.raises(UserError, match=r"settings\.json is damaged"), Store(tmp_path / "out", _SETTINGS):
        pass


def test_a_model_folder(tmp_path: Path):
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)
    for index in (DEEP, "[]", '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            weight_files(tmp_path)


def test_a_model_family_that_is_no_name():
    with pytest.raises(UserError, match="is not supported"):
        check_family({"model_type": {}})


def test_a_checkpoint_whose_manifest_guards_nothing(tmp_path: Path):
    checkpoint = tmp_path / "step-000001"
    checkpoint.mkdir()
    for manifest in ("{}", DEEP):
        (checkpoint / "manifest.json").write_text(manifest)
        with pytest.raises(UserError, match=r"is corrupt: manifest\.json"):
            verify_checkpoint(checkpoint)


def test_a_run_folder_is_reported_all_the_same(tmp_path: Path):
    (tmp_path / "config.toml").write_text(f"seed = {LONG}")
    (tmp_path / "summary.json").write_text(DEEP)
    rows = ['{"step": 1.0, "x": 0.5}', f'{{"step": 2.0, "x": {"9" * 400}}}', DEEP, '{"step": 3.0, "x": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert collect_run(tmp_path, 10).index["metrics"] == {"step": [1.0, 3.0], "x": [0.5, 1.0]}


@pytest.mark.parametrize(
    "calls", [5, [{}], [{"function": 1}], [{"function": {"name": "f", "arguments": "{"}}], [{"function": {}}]]
)
def test_a_task_file_with_calls_of_another_shape(tmp_path: Path, calls: object):
    path = tmp_path / "tasks.jsonl"
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    path.write_text(json.dumps({"prompt": [said, {"role": "user", "content": "u"}]}))
    with pytest.raises(UserError, match=r'tasks\.jsonl, line 1, message 1: "tool_calls" must be a list'):
        read_rows(path)


def test_certificates_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere.pem"))
    with pytest.raises(UserError, match="certificates of SSL_CERT_FILE cannot be read"):
        certificates.__wrapped__()
