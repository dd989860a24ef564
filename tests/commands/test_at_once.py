"""--help and a typo are answered before anything slow is imported, and a typo with what is meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {  # a command: an option that is almost one of its own, and what is meant
    "mosaic_fast.train": ("--rollout.grup-size", "--rollout.group-size"),
    "mosaic_fast.sft": ("--sft.conversation", "--sft.conversations"),
    "mosaic_fast.evaluate": ("--taskz", "--tasks"),
    "mosaic_fast.serve": ("embedded --prot", "--port"),
    "mosaic_fast.report": ("RUN --outt", "--out"),
    "mosaic_fast.show": ("RUN --statuz", "--status"),
    "mosaic_fast.report.export": ("RUN --formt", "--format"),
    "mosaic_fast.learner.calibrate": ("--outt", "--out"),
    "mosaic_fast.setup.gguf": ("a b --hlp", "--help"),
    "tools.simulate": ("--rankz", "--ranks"),
    "tools.soak": ("--kils", "--kills"),
    "tools.warmstart": ("--warmup-step", "--warmup-steps"),
    "mosaic_kernels.verify": ("--layr", "--layer"),
    "tools.verify_kernels": ("--arhc", "--arch"),
    "tools.configuration_page": ("--x", ""),
    "tools.draw_forest": ("--x", ""),
    "tools.gpu": ("--x", ""),
    "tools.replay_agentdojo": ("--x", ""),
    "tools.replay_bfcl": ("--x", ""),
    "tests.fuzz": ("--sed", "--seed"),
    "bench/run.py": ("--devise", "--device"),
    "bench/seeds.py": ("--task", "--tasks"),
    "bench/charts.py": ("", ""),
    "bench/gpu_plan.py": ("--x", ""),
}
WITHOUT = """
import contextlib, io, json, os, runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "matplotlib", "scipy", "pandas"):
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
said = []
for command, *arguments in json.loads(sys.argv[1]):
    sys.argv, code = [command, *arguments], None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            if command.endswith(".py"):
                runpy.run_path(command, run_name="__main__")
            else:
                runpy.run_module(command, run_name="__main__", alter_sys=True)
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
    said.append((code, out.getvalue()))
print(json.dumps(said))
"""


def said(*commands: Sequence[str]) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each, in one process that refuses to import what is slow."""
    paths = ":".join(str(ROOT / part) for part in ("", "kernels", "rollout", "bench"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, json.dumps(commands)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_every_command_is_here():
    """Whatever is run by its name; what is only ever started by another program is not."""
    started = {"mosaic_rollout.engine.sglang.server_side.launch", "tools.gpu.parts"}
    found = set()
    for folder, root in (("mosaic_fast", ""), ("tools", ""), ("kernels", "kernels"), ("rollout", "rollout")):
        for path in (ROOT / folder).rglob("*.py"):
            if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT / root).with_suffix("").parts
                found.add(".".join(parts).removesuffix(".__main__"))
    assert found - started == {name for name in COMMANDS if not name.startswith(("bench/", "tests."))}


def test_help_and_a_typo_wait_for_nothing():
    answers = said(*((command, "--help") for command in COMMANDS))
    for command, (code, text) in zip(COMMANDS, answers, strict=True):
        assert code == 0, f"{command}: {text}"
        assert text, command
    answers = said(*((command, *typo.split()) for command, (typo, _) in COMMANDS.items()))
    for (command, (_, meant)), (code, text) in zip(COMMANDS.items(), answers, strict=True):
        assert code == 2, f"{command}: {text}"
        assert not meant or ("did you mean" in text.splitlines()[-1] and meant in text.splitlines()[-1]), text


@pytest.mark.parametrize("command", ["mosaic_fast.evaluate", "mosaic_fast.learner.calibrate"])
def test_an_option_of_its_own_is_none_too_many(command: str):
    """Both spellings, with and without `=`; a value of another type is tyro's to name."""
    option = "timeout-s" if command == "mosaic_fast.evaluate" else "threads"
    for given in (f"--{option}", f"--{option.replace('-', '_')}"):
        ((code, text), (again, _)) = said((command, f"{given}=x"), (command, given, "x"))
        assert (code, again) == (2, 2)
        assert "no such option" not in text
