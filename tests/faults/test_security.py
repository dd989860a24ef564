"""Model output and tool output are data, keys stay in the environment, servers of ours on loopback."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mosaic_fast.cli import run_cli
from mosaic_fast.config import Config, JudgeConfig
from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.config.section import is_plain_url
from mosaic_fast.distributed import joined_world
from mosaic_fast.errors import UserError
from mosaic_fast.evaluate.arguments import parse
from mosaic_fast.evaluate.targets import api_key, resolve
from mosaic_fast.preferences import build_judge, probe_judge
from mosaic_fast.report.__main__ import main as report
from mosaic_fast.setup.build import build_setup
from mosaic_fast.setup.model_folder import model_folder
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.engine import EngineError
from mosaic_rollout.engine.sglang.server import ServerOptions, ServerProcess
from tests.faults.conftest import run
from tests.preferences.endpoint import Json, Raw, endpoint
from tests.rollout.tokenizers_for_tests import byte_tokenizer

ROOT = Path(__file__).parents[2]
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
KNOWN = {
    # Runs a function of the installed SGLang's own source, inside SGLang's process.
    ("rollout/mosaic_rollout/engine/sglang/server_side/cpu_stand_in/triton.py", "exec"),
    ("rollout/mosaic_rollout/engine/sglang/server_side/cpu_stand_in/triton.py", "compile"),
    # Runs AgentHarm's own files, from the package the user installed; no model's nor tool's text is run.
    ("rollout/mosaic_rollout/environments/agentharm/package.py", "exec"),
    ("rollout/mosaic_rollout/environments/agentharm/package.py", "compile"),
    # Writes handles of shared tensors for a server of ours, in SGLang's format; none is ever read.
    ("rollout/mosaic_rollout/engine/sglang/weights.py", "ForkingPickler"),
}


def dangers(source: str) -> Iterator[str]:
    """Whatever could run data as code: by name, so that a comment or a string is none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in FORBIDDEN_CALLS:
                yield name
            if name == "torch.load" and options.get("weights_only") != "True":
                yield name
            if (
                name == "yaml.load"
                and "SAFE" not in ast.unparse(node).upper()
                and "_YAML_LOADER" not in ast.unparse(node)
            ):
                yield name
            if options.get("shell", "False") != "False":
                yield "shell"
            if options.get("trust_remote_code", "False") != "False":
                yield "trust_remote_code"
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from (name for name in modules if name in FORBIDDEN_MODULES or name == "ForkingPickler")


@pytest.mark.parametrize(
    "source",
    [
        *("eval(x)", "exec(x)", "os.system(x)", "import pickle", "from pickle import loads", "torch.load(x)"),
        *("torch.load(x, weights_only=False)", "subprocess.run(x, shell=True)", "yaml.load(x)"),
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_a_danger_is_seen(source: str):
    assert list(dangers(source))


def test_nothing_runs_data_as_code():
    found = set()
    for folder in ("mosaic_fast", "rollout", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            found |= {(name, danger) for danger in dangers(path.read_text(encoding="utf-8"))}
    assert found == KNOWN


TRAPS = {
    "config": "import transformers\nclass Trap(transformers.PretrainedConfig): model_type = 'evil'\n",
    "model": "class Trap: pass\n",
    "tokenizer": "class Trap: pass\n",
}
TRUSTING = """
import contextlib, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        with contextlib.suppress(Exception):  # the traps are no whole models
            kind.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
"""


def test_code_in_a_model_folder_is_not_run(tmp_path: Path):
    """Under a family's own name, where the code is passed over, and under another, which is refused.

    That every trap does spring is seen first, where transformers is told to trust the folders.
    """
    traces = tmp_path / "was_run"
    traces.mkdir()
    folders = [tmp_path / "own", tmp_path / "evil"]
    plain = json.loads((model_folder("embedded") / "tokenizer_config.json").read_text())
    trapped = plain | {"auto_map": {"AutoTokenizer": ["trap_tokenizer.Trap", "trap_tokenizer.Trap"]}}
    for folder in folders:
        shutil.copytree(model_folder("embedded"), folder)
        for name, code in TRAPS.items():
            trace = str(traces / f"{folder.name} {name}")
            (folder / f"trap_{name}.py").write_text(f"open({trace!r}, 'w').close()\n{code}")
        settings = json.loads((folder / "config.json").read_text())
        settings["auto_map"] = {"AutoConfig": "trap_config.Trap", "AutoModelForCausalLM": "trap_model.Trap"}
        if folder.name == "evil":
            settings["model_type"] = "evil"
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "tokenizer_config.json").write_text(json.dumps(trapped))
    subprocess.run(
        [sys.executable, "-c", TRUSTING, *map(str, folders)],
        check=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert {path.name for path in traces.iterdir()} == {f"{f.name} {trap}" for f in folders for trap in TRAPS}
    for path in traces.iterdir():
        path.unlink()
    for folder in folders:
        for kind in (trapped, plain):
            (folder / "tokenizer_config.json").write_text(json.dumps(kind))
            with pytest.raises(UserError) if folder.name == "evil" else contextlib.nullcontext():
                build_setup(Config(), folder)
            assert list(traces.iterdir()) == []


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for %}", "{{ 1 / 0 }}"]
)
def test_a_chat_template_is_confined_and_a_broken_one_named(template: str):
    with pytest.raises(UserError, match="chat template"):
        Chat(byte_tokenizer(template), teach_loop=False)


KEY = "sk-never-written-4711"


def test_a_key_is_nowhere_but_in_the_header(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The endpoint even sends the key back. Console, log, report page and every file are searched."""
    folder, asked = tmp_path / "run", []

    def judge(request: Json) -> Raw | Json:
        asked.append(request)
        if len(asked) < 9:
            return {"reason": f"you are {KEY}", "winner": "1"}
        return Raw(status=500, body="x" * 290 + KEY)  # half of it within what is shown of a complaint

    monkeypatch.setenv("JUDGE_KEY", KEY)
    with endpoint(judge) as served:
        options = ["--judge.name", "llm", "--judge.endpoint", served.url, "--judge.model", "m"]
        options += ["--judge.api-key-env", "JUDGE_KEY", "--judge.retries", "0", "--steps", "30"]
        assert run_cli(lambda: run(folder, *options)) == 2
        monkeypatch.setattr(sys, "argv", ["report", str(folder)])
        assert run_cli(report) == 0
        assert served.keys[0] == f"Bearer {KEY}"
    said = "".join(capfd.readouterr())
    assert "HTTP 500" in said
    for secret in (KEY, KEY[:12]):
        assert secret not in said
        holders = [
            path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()
        ]
        assert holders == []
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--engine.args", "--host", "0.0.0.0"], "--host cannot be set"),
        (["--engine.args", "--ho=0.0.0.0"], "--host cannot be set"),
        (["--engine.args", "--api-key", KEY], "no key belongs in a configuration"),
        (["--engine.args", "--admin-api-key", KEY], "no key belongs in a configuration"),
        (["--engine.args", "--trust-remote-code"], "code in a model's folder is never run"),
        (["--engine.args", "--trust"], "code in a model's folder is never run"),
        (["--engine.args", "--config", "flags.yaml"], "name the flags themselves"),
        (["--engine.urls", f"http://me:{KEY}@there:1"], "no user or key"),
        (["--judge.endpoint", f"http://{KEY}@there/v1"], "no user or key"),
        (["--judge.endpoint", f"http://there/v1?api_key={KEY}"], "no user or key"),
        (["--judge.endpoint", f"http://there/{KEY}/v1"], "no user or key"),
        (["--engine.urls", f"http://there:1/#{KEY}"], "no user or key"),
        (["--judge.api-key-env", KEY], "the name of an environment variable"),
    ],
)
def test_what_would_expose_a_server_or_a_key_is_refused(tmp_path: Path, arguments: list[str], named: str):
    """The message does not repeat the key."""
    section, key = arguments[0].removeprefix("--").split(".")
    value = arguments[1:] if key in ("args", "urls") else arguments[1]
    path = tmp_path / "run.toml"
    kind = 'kind = "sglang"\n' if section == "engine" else ""
    path.write_text(f"[{section}]\n{kind}{key.replace('-', '_')} = {json.dumps(value)}\n")
    with pytest.raises(UserError, match=named) as refused:
        parse_train_arguments([str(path)])
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        *("http://localhost:30000/v1", "https://api.openai.com/v1", "http://[::1]:80", "https://h/api/v1/"),
        "https://x.openai.azure.com/openai/deployments/gpt-4o-mini-2024-07-18",
        "https://h/client/v4/accounts/0123456789abcdef0123456789abcdef/ai/v1",
        *("https://h/models/Qwen2.5-72B-Instruct-AWQ/v1", "https://h/keyboard/v1", "https://h/tokenizers/v1"),
    ],
)
def test_an_address_without_a_key_is_taken(url: str):
    assert is_plain_url(url)


@pytest.mark.parametrize(
    "place",
    [
        *("http://{}@h/v1", "http://me:{}@h/v1", "http://h/v1?{}", "http://h/v1?key={}", "http://h/v1#{}"),
        *("http://h/v1;key={}", "http://h/key/{}/v1", "http://h/api_key/{}", "http://h/v1/token={}"),
    ],
)
@pytest.mark.parametrize("key", [KEY, "x", "0123456789abcdef0123"])
def test_an_address_with_a_key_is_refused_without_repeating_it(place: str, key: str):
    url = place.format(key)
    with pytest.raises(UserError) as refused:
        resolve(url, parse([url, "--model-name", "m"]))
    assert key == "x" or key not in str(refused.value)
    assert not is_plain_url(url)


@pytest.mark.parametrize(
    "key", [KEY, "%73k-abc", "hf_abcdEFG", "a1" * 10, "AbCdEfGhIjKlMnOpQrStUvWxYz", "a%3Fk=x"]
)
def test_a_key_in_a_path_is_one(key: str):
    assert not is_plain_url(f"http://h/{key}/v1")


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_variable_that_is_empty_is_one_that_is_not_set(value: str | None, monkeypatch: pytest.MonkeyPatch):
    for name in ("MY_KEY", "OPENAI_API_KEY", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    asked = ["http://h/v1", "--model-name", "m"]
    assert api_key(parse(asked)) is None, "nothing was named"
    with pytest.raises(
        UserError, match="--api-key-env: the environment variable MY_KEY is not set, or empty"
    ):
        resolve(asked[0], parse([*asked, "--api-key-env", "MY_KEY"]))
    judge = JudgeConfig(name="llm", endpoint="http://h/v1", model="m", api_key_env="MY_KEY")
    with pytest.raises(UserError, match=r"judge\.api_key_env: the environment variable MY_KEY is not set"):
        build_judge(judge, Path("run"))
    with joined_world() as world:
        assert world.size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but RANK, .*not set"), joined_world():
        pass


def test_a_variable_that_is_no_number_and_a_proxy_that_is_none_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two', and must be a number"), joined_world():
        pass
    monkeypatch.setenv("ALL_PROXY", f"nothing://me:{KEY}@proxy")
    judge = build_judge(JudgeConfig(name="llm", endpoint="http://h/v1", model="m"), Path("run"))
    with pytest.raises(UserError, match="HTTP_PROXY, HTTPS_PROXY, ALL_PROXY") as refused:
        probe_judge(judge)
    assert KEY not in str(refused.value)


def test_a_launched_server_listens_on_loopback_alone(tmp_path: Path):
    """By the command line that a Python in its place is started with."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/flags\n')
    fake.chmod(0o755)
    options = ServerOptions(
        fake, "cpu", "float32", 512, 8, 4096, False, False, 0, 5.0, 5.0, ("--tp-size", "1")
    )
    process = ServerProcess(options, tmp_path / "log", 0)
    with pytest.raises(EngineError, match="exited with 0 while starting"):
        asyncio.run(process.start(tmp_path, 0))
    flags = (tmp_path / "flags").read_text().splitlines()
    assert flags.count("--host") == 1
    assert flags[flags.index("--host") + 1] == "127.0.0.1"
    assert process.url.startswith("http://127.0.0.1:")


def test_a_name_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """rich would stop at a tag that nothing opens, draw a bug, and matplotlib stop at half a fraction."""
    folder = tmp_path / "a[" / "b] [red]x :bug: $\\frac{1$"
    assert run_cli(lambda: run(folder, "--steps", "1")) == 0
    said = capfd.readouterr().out
    assert f"run folder {folder}" in said
    assert (folder / "curves.png").exists()
