"""Configuration files, command lines and run folders to resume."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import tomli_w
from pydantic import BaseModel

from mosaic_fast.config import Config
from mosaic_fast.config.read import load_config, parse_train_arguments, save_config
from mosaic_fast.errors import UserError
from mosaic_fast.report.collect import collect_run
from mosaic_fast.report.page import render_page
from mosaic_fast.run.folder import RunFolder
from tests.fuzz import hostile
from tests.fuzz.subject import Subject, Try


@contextlib.contextmanager
def _files(folder: Path) -> Iterator[Try]:
    path, again = folder / "run.toml", folder / "again.toml"

    def attempt(random: Random) -> str:
        path.write_bytes(_toml(random))
        try:
            config = load_config(path)
        except UserError as error:
            assert str(path) in str(error), error
            return "refused"
        save_config(config, again)
        assert load_config(again) == config
        return "accepted"

    yield attempt


def _toml(random: Random) -> bytes:
    """A few keys with values that fit, that nearly fit or that do not; or a file damaged byte by byte."""
    values: dict[str, object] = {}
    for _ in range(random.randrange(4)):
        section, key = random.choice(KEYS)
        inside = values.setdefault(section, {}) if section else values
        if isinstance(inside, dict):
            inside[key if random.random() < 0.95 else hostile.text(random)] = _value(random)
    # TOML has no null, nor everything that JSON has, and its writer gives up where values are nested deep.
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        content = tomli_w.dumps(values).encode("utf-8", "surrogatepass")
        return content if random.random() < 0.6 else hostile.damaged(random, content)
    return hostile.damaged(random, tomli_w.dumps(Config().model_dump(exclude_none=True)).encode())


def _value(random: Random) -> object:
    likely = (
        0,
        1,
        2,
        8,
        0.5,
        1.0,
        True,
        "llm",
        "rule",
        "sglang",
        "grpo",
        "dpo",
        "fork_at_check",
        "a:B",
        ["x"],
    )
    return random.choice(likely) if random.random() < 0.6 else hostile.value(random)


@contextlib.contextmanager
def _command_lines(folder: Path) -> Iterator[Try]:
    def attempt(random: Random) -> str:
        arguments = _arguments(random)
        out, errors = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                config, _, _ = parse_train_arguments(arguments)
        except UserError:
            return "refused"
        except SystemExit as ended:  # tyro's own, which has printed why
            assert ended.code in (0, 2), (arguments, ended.code)
            assert out.getvalue() + errors.getvalue(), arguments
            assert "Traceback" not in errors.getvalue()
            return "refused" if ended.code else "help"
        assert isinstance(config, Config)
        return "accepted"

    yield attempt


def _arguments(random: Random) -> list[str]:
    arguments = []
    for _ in range(random.randrange(1, 4)):
        section, key = random.choice(KEYS)
        name = f"--{section}.{key}" if section else f"--{key}"
        if random.random() < 0.7:
            name = name.replace("_", "-")
        found = _value(random)
        text = found if isinstance(found, str) else json.dumps(found)
        arguments += [name] if isinstance(found, bool) else [name, text.encode("utf-8", "replace").decode()]
    strange = (
        "--resume",
        "--",
        "-x",
        "--no-such",
        "--model",
        "--model.path",
        "--run-dir",
        "\x00",
        "nowhere.toml",
    )
    if random.random() < 0.3:
        arguments.insert(
            random.randrange(len(arguments) + 1), random.choice((*strange, hostile.text(random)))
        )
    return [argument.replace("\0", "\udcff") for argument in arguments]  # no program is given a NUL


@contextlib.contextmanager
def _run_folders(folder: Path) -> Iterator[Try]:
    """A run folder in which one file is damaged: it is resumed as far as its files are read, and reported."""
    row = {"step": 1.0, "reward/total": 0.5, "time/step_s": 1.0}
    rollout = {
        **{"task_id": "t-1", "kind": "benign", "status": "answered", "group_id": 0, "rollout_id": 0},
        **{"harm": False, "done": True, "progress": 1.0, "details": {"x": 1.0}, "token_ids": [1, 2, 3, 4]},
        **{"messages": [{"role": "user", "content": "go"}], "trained": [2, 3], "preferences": [0.5]},
        **{"steps": [{"span": [2, 4], "plan": "p", "action": "answer", "answer": "a", "text": "a"}]},
        **{"reasons": ["-"], "reward": {"total": 1.0}, "advantage": 0.0, "parent_id": None},
    }
    sound = {
        "config.toml": tomli_w.dumps(Config().resolved().model_dump(exclude_none=True)).encode(),
        "metrics.jsonl": "".join(
            json.dumps(row | {"step": step}) + "\n" for step in (1.0, 2.0, 3.0)
        ).encode(),
        "summary.json": json.dumps({"complete": True, "before": {"x": 0.5}, "counts": {}}).encode(),
        "trajectories/step-000001.jsonl": (json.dumps(rollout) + "\n").encode() * 2,
    }
    run = folder / "run"
    (run / "trajectories").mkdir(parents=True)

    def attempt(random: Random) -> str:
        damaged = random.choice(list(sound))
        for name, content in sound.items():
            (run / name).write_bytes(content)
        if damaged.endswith(".toml") or random.random() < 0.5:
            (run / damaged).write_bytes(hostile.damaged(random, sound[damaged]))
        else:
            lines = [json.loads(line) for line in sound[damaged].decode().splitlines()]
            lines[-1] = hostile.changed(random, lines[-1])
            (run / damaged).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        assert "<script>alert" not in render_page([collect_run(run, 100)])
        try:
            config, resume, name = parse_train_arguments(["--resume", "--run-dir", str(run)])
        except UserError:
            return "refused"
        with RunFolder(config, name, resume=resume) as opened:
            opened.open(config, 2)
            kept = [found["step"] for found in opened.metrics()]
        assert damaged == "metrics.jsonl" or kept == [1.0, 2.0], kept
        return "resumed"

    yield attempt


def _keys(model: type[BaseModel], section: str = "") -> list[tuple[str, str]]:
    found = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found += _keys(info.annotation, name)
        else:
            found.append((section, name))
    return found


KEYS = _keys(Config)
FILES = Subject("configuration files", 0.15, _files)
COMMAND_LINES = Subject("command lines", 0.1, _command_lines)
RUN_FOLDERS = Subject("run folders", 0.05, _run_folders)
