"""A whole run as a user starts it: resumed = uninterrupted to the bit, nothing lost, mistakes named."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mosaic_fast.config.read import parse_train_arguments
from mosaic_fast.errors import TrainingError, UserError
from mosaic_fast.learner.checkpoint import latest_checkpoint
from mosaic_fast.train import train
from tests.evaluate.serving import evaluate
from tests.learner.conftest import BANDIT, STEPS


@pytest.fixture(scope="session")
def options(options: list[str]) -> list[str]:
    return [*options, *BANDIT]


@pytest.fixture(scope="session")
def finished(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run(options, folder) == 0
    return folder


def run(options: Sequence[str], folder: Path, *more: str) -> int:
    config, resume, name = parse_train_arguments([*options, "--run-dir", str(folder), *more])
    return train(config, name, resume=resume)


def start(
    options: Sequence[str],
    folder: Path,
    *more: str,
    limit: Callable[[], None] | None = None,
    module: str = "mosaic_fast.train",
):
    arguments = [sys.executable, "-m", module, *options, "--run-dir", str(folder), *more]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def learned(folder: Path) -> list[dict[str, float]]:
    """The metrics of every step, without those that a clock gives."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def assert_same_run(folder: Path, other: Path, steps: int = STEPS) -> None:
    last = f"checkpoints/step-{steps:06d}"
    for name in ("model.safetensors", "trainer/state.safetensors"):
        assert digest(folder / last / name) == digest(other / last / name), name
    known = [json.loads((f / last / "progress.json").read_text())["attacks"] for f in (folder, other)]
    assert known[0] == known[1]
    assert learned(folder) == learned(other)
    for path in sorted((folder / "trajectories").iterdir()):
        assert digest(path) == digest(other / "trajectories" / path.name), path.name
    summaries = [json.loads((f / "summary.json").read_text()) for f in (folder, other)]
    for key in ("before", "after", "seed", "steps", "complete"):
        assert summaries[0][key] == summaries[1][key], key


def test_a_finished_run_holds_everything(finished: Path):
    names = {path.name for path in finished.iterdir()} - {"notes.jsonl"}  # where there was something to say
    assert names == {
        *(
            ".lock",
            "config.toml",
            "cost.toml",
            "proof.json",
            "metrics.jsonl",
            "trajectories",
            "checkpoints",
            "summary.json",
        ),
        *("curves.svg", "curves.png"),
    }
    assert len(learned(finished)) == STEPS
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == [
        f"step-{n:06d}" for n in range(STEPS - 2, STEPS + 1)
    ]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["complete"]
    assert set(summary["before"]) == set(summary["after"])
    assert "safety/harmful_refused" in summary["after"]
    assert not list(finished.rglob(".tmp-*"))


def test_the_checkpoint_is_a_hugging_face_folder(finished: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = latest_checkpoint(finished / "checkpoints")
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    assert tokenizer.chat_template


def test_killed_and_interrupted_is_uninterrupted(options: list[str], finished: Path, tmp_path: Path):
    """kill -9 in the middle, resumed, Ctrl-C, resumed: the same bits as the run that nothing stopped."""
    folder = tmp_path / "run"
    killed = start(options, folder)
    wait_for(folder / "checkpoints" / "step-000001", killed)
    killed.kill()
    killed.communicate()
    assert not (folder / "summary.json").exists()

    stopped = start(options, folder, "--resume")
    wait_for(folder / "checkpoints" / "step-000003", stopped)
    with contextlib.suppress(ProcessLookupError):
        stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=600)
    assert stopped.returncode == 130, errors
    assert "Traceback" not in errors
    assert not json.loads((folder / "summary.json").read_text())["complete"]

    assert run(options, folder, "--resume") == 0
    assert_same_run(finished, folder)


def test_resume_on_a_finished_run_changes_nothing(options: list[str], finished: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    assert run(options, folder, "--resume") == 0
    assert_same_run(finished, folder)


def test_a_run_folder_is_never_overwritten(options: list[str], finished: Path):
    with pytest.raises(UserError, match="is not empty; add --resume"):
        run(options, finished)


def test_resume_in_an_empty_folder_starts_at_the_beginning(
    options: list[str], finished: Path, tmp_path: Path
):
    assert run(options, tmp_path, "--resume") == 0
    assert_same_run(finished, tmp_path)


@pytest.mark.parametrize("damaged", ["model.safetensors", "trainer/state.safetensors", "manifest.json"])
def test_a_corrupt_checkpoint_is_named_and_left_alone(
    options: list[str], finished: Path, tmp_path: Path, damaged: str
):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    path = folder / "checkpoints" / f"step-{STEPS:06d}" / damaged
    path.write_bytes(path.read_bytes()[:-7] + b"\x00garbage")
    before = digest(path)
    with pytest.raises(
        TrainingError, match=rf"step-{STEPS:06d} is corrupt: {damaged}.*resume from step-00000"
    ):
        run(options, folder, "--resume")
    assert digest(path) == before


def test_a_full_disk_is_named_and_the_last_checkpoint_intact(options: list[str], tmp_path: Path):
    """Files above 1 MB cannot be written once the first checkpoint is there: the second one fails."""
    assert run(options, tmp_path / "run", "--steps", "1") == 0
    kept = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None
    sums = {path: digest(path) for path in kept.rglob("*") if path.is_file()}

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    second = start(options, tmp_path / "run", "--steps", "2", "--resume", limit=small_files)
    _, errors = second.communicate(timeout=600)
    assert second.returncode == 2, errors
    assert "cannot be written" in errors
    assert f"{kept.name} is intact" in errors
    assert "Traceback" not in errors
    assert {path: digest(path) for path in kept.rglob("*") if path.is_file()} == sums
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


def test_weights_that_blow_up_stop_the_run_and_are_not_kept(options: list[str], tmp_path: Path):
    with pytest.raises(TrainingError, match="not finite"):
        run([*options, "--optim.grad-clip", "1e30", "--optim.lr", "1e38"], tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") is None


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: shutil.rmtree(folder), "no folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
        (lambda folder: (folder / "config.json").write_text("{"), "config"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_a_model_folder_that_lacks_something_is_named(
    options: list[str], model_folder: Path, tmp_path: Path, damage: Callable[[Path], object], named: str
):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=named):
        run([*options, "--model.path", str(folder)], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mistake_prints_one_message_and_no_traceback():
    environment = {**os.environ, "COLUMNS": "100"}
    process = subprocess.run(
        [sys.executable, "-m", "mosaic_fast.train", "nowhere.toml"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert process.returncode == 2
    assert process.stderr == "error: there is no configuration file nowhere.toml\n"


def test_an_evaluation_of_a_run_and_of_its_model_agree(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands = {
        "run": [str(finished)],
        "model": [
            str(latest_checkpoint(finished / "checkpoints")),
            "--config",
            str(finished / "config.toml"),
        ],
    }
    found = {}
    for name, target in commands.items():
        arguments = [*target, "--tasks", "6", "--json", str(tmp_path / f"{name}.json")]
        assert evaluate(monkeypatch, *arguments) == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["rates"]
    assert found["run"] == found["model"]
    summary = json.loads((finished / "summary.json").read_text())
    assert {name: rate["value"] for name, rate in found["run"].items()} == summary["after"]
