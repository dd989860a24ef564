"""What `import mosaic_fast` hands out for scripts and notebooks: train, evaluate, load_run (docs/api.md)."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Literal, TypeVar

from pydantic import JsonValue

from mosaic_fast.config import Config
from mosaic_fast.config.read import load_config, pinned_config
from mosaic_fast.errors import UserError
from mosaic_fast.evaluate.arguments import Arguments, checked
from mosaic_fast.evaluate.results import SuiteResult
from mosaic_fast.learner.checkpoint import latest_checkpoint
from mosaic_fast.policy import Policy
from mosaic_fast.report.read import Notes, read_summary, require_run_folder, trajectory_files
from mosaic_fast.run.folder import read_metrics_rows
from mosaic_fast.run.interrupt import Interrupt
from mosaic_fast.setup.given import Given, Tasks, take_given

Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """A run folder, read anew at every access: it may belong to a run that is still going."""

    path: Path

    @property
    def config(self) -> Config:
        """What the run was told, every default written out. UserError where config.toml is missing."""
        return load_config(self.path / "config.toml")

    @property
    def metrics(self) -> list[dict[str, float]]:
        """A row for every training step, by metric name (docs/configuration.md, Metrics); `step` from 1."""
        return read_metrics_rows(self.path / "metrics.jsonl")

    @property
    def summary(self) -> dict[str, JsonValue]:
        """summary.json: `before` and `after`, the held-out rates, `complete`. Empty until the run ends."""
        return read_summary(self.path, Notes())

    @property
    def complete(self) -> bool:
        """Whether the run reached its last step, and was evaluated then."""
        return self.summary.get("complete") is True

    def trajectories(self, step: int | None = None) -> Iterator[dict[str, JsonValue]]:
        """Every rollout of a step, counted from 1, or of all: the rows of trajectories/step-*.jsonl.

        A row has the episode's messages and steps, token_ids [L], trained [L], rollout_logprobs [L], verdict,
        preferences [G], reward and advantage. UserError where the step has none.
        """
        files = dict(trajectory_files(self.path))
        if step is not None and step not in files:
            raise UserError(f"{self.path} holds no trajectories of step {step}")
        for number, path in files.items():
            if step in (None, number):
                for line in path.read_text(encoding="utf-8").splitlines():
                    yield json.loads(line)

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint, a Hugging Face model folder; None before the first."""
        return latest_checkpoint(self.path / "checkpoints")

    def policy(self, *, trainable: bool = False) -> Policy:
        """The policy of the newest checkpoint; with LoRA, the merged one. UserError where there is none."""
        from mosaic_fast.setup.model_folder import load_policy

        checkpoint = self.checkpoint
        if checkpoint is None:
            raise UserError(f"the run {self.path} has no complete checkpoint yet")
        return load_policy(self.config, checkpoint, trainable=trainable)


def load_run(folder: str | Path) -> Run:
    """The run in a folder that training wrote. UserError where it is none.

    >>> load_run("runs/20260701-120000-bank").metrics[-1]["reward/total"]    # doctest: +SKIP
    0.81
    """
    require_run_folder(Path(folder))
    return Run(Path(folder))


def train(
    config: Config | str | Path | None = None,
    *,
    environment: object = None,
    tasks: Tasks | None = None,
    heldout_tasks: Tasks | None = None,
    judge: object = None,
    resume: bool = False,
    name: str | None = None,
) -> Run:
    """Train a policy and return its run: `python -m mosaic_fast.train` for scripts and notebooks.

    config: a `Config`, or a TOML file; None: the embedded model in the embedded world. `config.run_dir` is
        the run folder, by default runs/<time>-<name>.
    environment: a name as in `env.name`, or an object: an environment (`sample` and `reset(task)`), or a
        class or function that makes an object with `reset(**row)`, tools and a verdict, which needs tasks.
    tasks, heldout_tasks: a JSON Lines file, a list of rows for such a class, or a list of `Task` of the
        environment, each in the split that it names.
    judge: a name as in `judge.name`, or an object with `judge(groups)` or `score_group(group)`.
    resume: go on from the last checkpoint in `config.run_dir`; the same objects have to be given again.

    Raises UserError for what its caller can mend, TrainingError where training cannot go on; what the last
    checkpoint holds is kept. Ctrl-C ends the run after what is under way, and the run is returned with
    `complete` False; a second one raises KeyboardInterrupt. Inside a running event loop, as in a notebook,
    and in other threads than the main one it trains as well. Method: MOSAIC, arXiv 2603.03205.
    """
    settings = load_config(Path(config), pin=True) if isinstance(config, str | Path) else config or Config()
    settings = pinned_config(settings)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError(
            "mosaic_fast.train trains in this process alone; on several ranks run the command, "
            "torchrun --nproc-per-node N -m mosaic_fast.train run.toml"
        )
    settings, given = take_given(settings, environment, tasks, heldout_tasks, judge)
    if name is None:
        name = Path(config).stem if isinstance(config, str | Path) else settings.env.name.rpartition(":")[2]
    with Interrupt() as interrupt:
        return _outside_loops(lambda: _train(settings, name, resume, interrupt, given))


def _train(config: Config, name: str, resume: bool, interrupt: Interrupt, given: Given) -> Run:
    from mosaic_fast.run.folder import RunFolder
    from mosaic_fast.train import train_in

    with RunFolder(config, name, resume=resume) as folder:
        train_in(folder, config, interrupt, given=given)
        return load_run(folder.path)


def evaluate(
    model: str | Path | Run | Policy,
    *,
    environment: object = None,
    tasks: Tasks | None = None,
    heldout_tasks: Tasks | None = None,
    config: Config | str | Path | None = None,
    tokenizer: str | Path | None = None,
    split: Literal["heldout", "train"] = "heldout",
    count: int = 300,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> SuiteResult:
    """Play tasks with a policy; the rates of harm, refusal, completion and so on, with 95% intervals.

    model: a run or its folder (the newest checkpoint), a model folder, "embedded", or a `Policy`.
    environment, tasks, heldout_tasks: as in `train`; None: what the run or `config` names.
    config: where the model is no run: its environment and limits; None: the embedded world.
    tokenizer: of a Policy, the model folder whose tokenizer and chat template it speaks; None: the folder
        that it was loaded from.
    count: how many tasks of the split, all if there are fewer. samples: episodes a task. temperature: 0 is
        greedy. The tasks are the same for every model; `seed` is of the draws.

    `result.rates[name].rate` has `value`, `hits` and `total`; `.low` and `.high` are its interval (Wilson
    1927; several samples of a task count as one task's). Raises UserError, and TrainingError where the
    engine fails.
    """
    from mosaic_fast.evaluate.play import evaluate_target
    from mosaic_fast.evaluate.targets import resolve

    policy = model if isinstance(model, Policy) else None
    if isinstance(model, Policy):
        folder = str(tokenizer or model.model.name_or_path)
    else:
        folder = str(model.path if isinstance(model, Run) else model)
    file = str(config) if isinstance(config, str | Path) else None
    arguments = checked(
        Arguments(
            (folder,), config=file, split=split, tasks=count, samples=samples,
            temperature=temperature, seed=seed,
        )
    )  # fmt: skip
    target = resolve(folder, arguments, config if isinstance(config, Config) else None)
    settings, given = take_given(target.config, environment, tasks, heldout_tasks)
    suite = replace(target.suites[0], env=settings.env)
    date = settings.rollout.date or datetime.date.today().isoformat()
    settings = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"date": date})})
    target = replace(target, config=settings, suites=(suite,))
    return _outside_loops(lambda: evaluate_target(target, arguments, given.environment, policy))


def _outside_loops(work: Callable[[], Result]) -> Result:
    """What `work` gives, in a thread of its own where an event loop runs in this one, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    found: list[Result] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001  it is raised where it was asked for
            raised.append(error)

    thread = Thread(target=run, name="mosaic_fast", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return found[0]
