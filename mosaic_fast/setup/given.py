"""Objects that `mosaic_fast.train` is given in place of what a configuration names, and their record."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mosaic_fast.config import EVALUATION_ONLY, Config
from mosaic_fast.config.hub import data_path
from mosaic_fast.config.read import revised
from mosaic_fast.errors import UserError
from mosaic_fast.preferences import Judge
from mosaic_fast.preferences.llm_judge import LLMJudge
from mosaic_fast.preferences.own_judge import guarded_judge
from mosaic_fast.preferences.rule_judge import RuleJudge
from mosaic_fast.run.durable import write_text
from mosaic_fast.setup.environment import build_environment
from mosaic_rollout.environments.custom import GivenTasks, given_environment, spec_of, split_tasks
from mosaic_rollout.foreign.code import import_named
from mosaic_rollout.types import Environment, Task

RECORD = "given.json"
"""File in a run folder: which objects the run was given, so that a resume is given the same."""

Tasks = str | Path | Sequence[Mapping[str, object]] | Sequence[Task]


@dataclass(frozen=True)
class Given:
    """What stands for the parts that a configuration names; None: the configuration's own."""

    environment: Environment | None = None
    judge: Judge | None = None
    record: Mapping[str, str] = field(default_factory=dict)  # argument -> what it was, in words

    def refuse_another(self, run_folder: Path) -> None:
        """UserError where the run in the folder was given other objects, or none."""
        if not (run_folder / "config.toml").is_file():
            return
        try:
            before = json.loads((run_folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            before = {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{run_folder / RECORD} cannot be read: {error}") from None
        if before != self.record:
            raise UserError(
                f"the run in {run_folder} was given {_listed(before)}, now it is given "
                f"{_listed(self.record)}: pass the same objects again, mosaic_fast.train(config, ..., "
                "resume=True), or start a new run"
            )

    def keep(self, run_folder: Path) -> None:
        """given.json in the run folder; nothing where no object was given."""
        if self.record:
            write_text(run_folder / RECORD, json.dumps(self.record, indent=1) + "\n")


NOTHING = Given()


def take_given(
    config: Config,
    environment: object = None,
    tasks: Tasks | None = None,
    heldout_tasks: Tasks | None = None,
    judge: object = None,
) -> tuple[Config, Given]:
    """The configuration that says what is given, and the objects, guarded. UserError for what does not fit.

    environment, judge: names as in the configuration, or objects; then their class is named in the
    configuration. tasks, heldout_tasks: files as in the configuration, rows, or `Task` objects.
    """
    record: dict[str, str] = {}
    files = {"tasks": tasks, "heldout_tasks": heldout_tasks}
    changes: dict[str, object] = {}
    if environment is not None:
        name = environment if isinstance(environment, str) else spec_of(environment)
        changes = {"name": name, "tasks": None, "heldout_tasks": None}
        if not isinstance(environment, str):
            record["environment"] = name
    changes |= {key: str(value) for key, value in files.items() if isinstance(value, str | Path)}
    config = revised(config, {"env": changes}) if changes else config
    played = _environment(config, environment, files, record)
    found: Judge | None = None
    if isinstance(judge, str):
        config = revised(config, {"judge": {"name": judge}})
    elif judge is not None:
        record["judge"] = spec_of(judge)
        config = revised(config, {"judge": {"name": record["judge"]}})
        made = judge() if inspect.isclass(judge) else judge
        found = made if isinstance(made, RuleJudge | LLMJudge) else guarded_judge(made, record["judge"])
    return config, Given(played, found, record)


def _environment(
    config: Config, given: object, tasks: Mapping[str, Tasks | None], record: dict[str, str]
) -> Environment | None:
    """The environment that objects make; None where the configuration says it all."""
    lists = {key: value for key, value in tasks.items() if not isinstance(value, str | Path | None)}
    listed = {key: split_tasks(value, key) for key, value in lists.items()}
    rows = {key: found for key, (found, _) in listed.items() if found is not None}
    if not listed and (given is None or isinstance(given, str)):
        return None
    record |= {key: _digest(value) for key, value in lists.items()}
    env = config.env
    if given is not None and not isinstance(given, str):
        environment = _own(config, given, rows)
    elif rows:
        environment = _own(config, _class_named(env.name), rows)
    else:
        environment = build_environment(config)
    if environment.name in EVALUATION_ONLY:
        raise UserError(
            f"environment: {environment.name} is for evaluation only, its authors ask that nothing be "
            "trained on it; name it to python -m mosaic_fast.evaluate MODEL --suite NAME=DATA"
        )
    chosen = [task for _, found in listed.values() for task in found or ()]
    return GivenTasks(environment, chosen) if chosen else environment


def _own(config: Config, given: object, rows: Mapping[str, Sequence[Mapping[str, object]]]) -> Environment:
    """An environment of the user's, its tasks from `rows` or from the files of the configuration."""
    env = config.env
    return given_environment(
        given,
        rows.get("tasks") or (data_path(env.tasks) if env.tasks else None),
        rows.get("heldout_tasks")
        or (data_path(env.heldout_tasks, "env.heldout_tasks") if env.heldout_tasks else None),
        max_observation_chars=env.max_observation_chars,
    )


def _digest(tasks: Sequence[object]) -> str:
    """Rows or tasks as a record names them: how many there are, and a hash of what they hold."""
    plain = [[one.task_id, one.kind, one.split] if isinstance(one, Task) else one for one in tasks]
    text = json.dumps(plain, sort_keys=True, default=str)
    return f"{len(plain)} tasks, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _listed(record: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {what}" for name, what in record.items()) or "no object"


def _class_named(name: str) -> object:
    """The user's class that env.name names, to be given rows. UserError where it names no such class."""
    if ":" not in name:
        raise UserError(
            f"tasks: rows belong to an environment of your own; {name!r} has tasks of its own, choose among "
            "them with Task objects"
        )
    return import_named(name, "env.name")
