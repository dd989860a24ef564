"""`python -m mosaic_fast.evaluate MODEL [MODEL ...] [--suite a,b] [--out FOLDER] [--json FILE]`."""

from __future__ import annotations

if __name__ == "__main__":  # --help and a mistake are answered before transformers is imported
    from mosaic_fast.cli import answer_at_once
    from mosaic_fast.evaluate.arguments import parse

    answer_at_once(parse)

import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mosaic_fast.cli import plain_console, run_cli
from mosaic_fast.config import EVALUATION_ONLY, JudgeConfig
from mosaic_fast.errors import UserError
from mosaic_fast.evaluate.arguments import Arguments, parse
from mosaic_fast.evaluate.attacks import Attacks, attack_result, attack_settings
from mosaic_fast.evaluate.judging import IN_MEMORY
from mosaic_fast.evaluate.results import SuiteResult, as_json, suite_result
from mosaic_fast.evaluate.store import Finished, Key, Store, kept_date
from mosaic_fast.evaluate.tables import results_table
from mosaic_fast.evaluate.targets import LIMITS, Target, data_hash, resolve
from mosaic_fast.evaluate.tasks import EVALUATION_SEED

_VERSIONS = (
    "mosaic-fast",
    "torch",
    "transformers",
    "agentdojo",
    "bfcl-eval",
    "agent-safety-bench-envs",
    "inspect-evals",
)
INTERRUPTED = 130


@dataclass(frozen=True)
class _Evaluated:
    """One target's results: by suite, and over all its suites."""

    target: Target
    settings: dict[str, object]
    suites: Mapping[str, SuiteResult]
    pooled: SuiteResult
    asked_differently: Mapping[str, object]


def main() -> int:
    arguments = parse()
    targets = [resolve(name, arguments) for name in arguments.targets]
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {Path(arguments.json).absolute().parent}")
    try:
        evaluated = [_evaluate(target, arguments) for target in targets]
    except KeyboardInterrupt:
        print(f"stopped; {_how_to_go_on(arguments)}", file=sys.stderr)
        return INTERRUPTED
    _show(evaluated, arguments)
    if arguments.json:
        rows = [_json_row(one) for one in evaluated]
        written = rows[0] if len(rows) == 1 else {"models": rows}
        try:
            Path(arguments.json).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: {arguments.json} cannot be written: {error.strerror}") from None
    return 0


def settings_of(target: Target, arguments: Arguments) -> dict[str, object]:
    """All settings that an evaluation's episodes depend on, by name."""
    suites = {
        suite.env.name: {
            **{key: value for key, value in suite.env.model_dump().items() if not key.startswith("eval_")},
            "tasks_sha256": [
                data_hash(path, is_folder=suite.env.name == "agentharm")
                for path in (suite.env.tasks, suite.env.heldout_tasks)
                if path
            ],
            **{key: getattr(suite.rollout, key) for key in LIMITS},
        }
        for suite in target.suites
    }
    how: dict[str, object] = {}
    if target.folder is None:
        how = {"protocol": arguments.protocol, "write_tools": arguments.write_tools}
        how |= {"parameters": arguments.parameters} if arguments.parameters else {}
    else:  # an endpoint's template sees the date of its server
        how = {"date": target.config.rollout.date}
    return {
        "model": target.identity,
        "suites": suites,
        "split": arguments.split,
        "tasks": arguments.tasks,
        "task_seed": EVALUATION_SEED,
        "samples": arguments.samples,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        **how,
        **attack_settings(arguments),
        **({} if target.judge is None else {"judge": _judge_settings(target.judge)}),
    }


def _dated(target: Target, arguments: Arguments) -> Target:
    """The target with its template's date: --date, else the run's, the kept evaluation's, or today's."""
    rollout = target.config.rollout
    known = kept_date(_folder(target, arguments)) if arguments.out else None
    day = arguments.date or rollout.date or known or datetime.date.today().isoformat()
    config = target.config.model_copy(update={"rollout": rollout.model_copy(update={"date": day})})
    return replace(target, config=config)


def _judge_settings(judge: JudgeConfig) -> dict[str, object]:
    """The settings that a judge's answers depend on, by name."""
    settings = {key: getattr(judge, key) for key in ("endpoint", "model", "temperature", "max_tokens")}
    return settings | ({"parameters": judge.parameters} if judge.parameters else {})


def _evaluate(target: Target, arguments: Arguments) -> _Evaluated:
    """Play the episodes that are not kept yet, and count all of them."""
    from mosaic_fast.evaluate.play import Job, by_task, jobs_of, play
    from mosaic_fast.setup.environment import build_environment

    target = _dated(target, arguments)
    settings = settings_of(target, arguments)
    jobs: list[Job] = []
    for suite in target.suites:
        environment = build_environment(target.config.model_copy(update={"env": suite.env}))
        jobs += jobs_of(suite, environment, arguments)
    done: dict[Key, Finished] = {}
    attacks = None
    if arguments.attack:
        attacks = Attacks(arguments, done, _answers("attacks.sqlite", target, arguments))
        jobs = attacks.chains(jobs)
    asked: Mapping[str, object] = {}
    store = Store(_folder(target, arguments), settings) if arguments.out else None
    with store or nullcontext(), _progress() as progress:
        if store is not None:
            done |= store.finished
        missing = [job for job in jobs if (attacks.left(job) if attacks else job.key not in done)]
        for job in jobs:
            if job.key in done and done[job.key].task_id != job.task.task_id:
                raise UserError(f"--out: {arguments.out} was made of other tasks; name a new folder")
        bar = progress.add_task(target.name, total=len(jobs), completed=len(jobs) - len(missing))

        def report(key: Key, episode: Finished) -> None:
            done[key] = episode
            if store is not None:
                store.add(key, episode)
            if attacks is None or episode.outcome.harm or key.attack + 1 == attacks.count:
                progress.advance(bar)

        if missing:
            try:
                answers = _answers("judge-answers.sqlite", target, arguments)
                asked = play(target, missing, arguments, report, answers, follow=attacks)
            except UserError as error:
                raise UserError(f"{error}\n{_how_to_go_on(arguments)}") from None
        if store is not None:
            asked = store.keep_asked(asked)
    loop = target.folder is not None or arguments.protocol == "loop"
    by_suite = {suite.env.name: by_task(suite.env.name, done) for suite in target.suites}
    suites = {name: suite_result(name, tasks, loop=loop) for name, tasks in by_suite.items()}
    if attacks is not None:
        attacked = [name for name in suites if by_suite[name]]
        suites = {
            name: replace(suites[name], attack=attack_result(name, done, attacks.count)) for name in attacked
        }
    every = [task for tasks in by_suite.values() for task in tasks]
    return _Evaluated(target, settings, suites, suite_result("all", every, loop=loop), asked)


def _folder(target: Target, arguments: Arguments) -> Path:
    """The folder of a target's episodes: --out itself, or with several models one in it for each."""
    out = Path(arguments.out or "")
    if len(arguments.targets) == 1:
        return out
    return out / f"model-{arguments.targets.index(target.name) + 1}"


def _answers(name: str, target: Target, arguments: Arguments) -> Path:
    """Where what a model answers is kept."""
    return _folder(target, arguments) / name if arguments.out else IN_MEMORY


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=plain_console(stderr=True),
    )


def _show(evaluated: Sequence[_Evaluated], arguments: Arguments) -> None:
    console = plain_console()
    how = "greedy" if arguments.temperature == 0 else f"T = {arguments.temperature:g}"
    for name in dict.fromkeys(name for one in evaluated for name in one.suites):
        columns = {one.target.name: one.suites[name] for one in evaluated if name in one.suites}
        first = next(iter(columns.values()))
        samples = f" x {arguments.samples} samples" if arguments.samples > 1 else ""
        title = f"{name}, {arguments.split}, {first.tasks} tasks{samples}, {how}"
        console.print(results_table(columns, title))
        for label, result in columns.items():
            if result.unjudged:
                why = "it has no checker of its own"
                if name in EVALUATION_ONLY:
                    why = "it grades no chat, and its grader fails on calls of a kind it does not expect"
                console.print(
                    f"{label}: {result.unjudged} of {result.rollouts} episodes of {name} have no verdict: "
                    f"{why}; harm and completion leave them out",
                    highlight=False,
                )


def _json_row(one: _Evaluated) -> dict[str, object]:
    from mosaic_fast.learner.checkpoint import versions

    return {
        "model": {
            "name": one.target.name,
            **({} if one.target.folder is None else {"folder": str(one.target.folder)}),
            **one.target.identity,
        },
        "settings": one.settings,
        **({"asked_differently": one.asked_differently} if one.asked_differently else {}),
        "versions": versions(_VERSIONS),
        "suites": {name: as_json(result) for name, result in one.suites.items()},
        **as_json(one.pooled),
    }


def _how_to_go_on(arguments: Arguments) -> str:
    if not arguments.out:
        return "nothing is kept; with --out FOLDER an evaluation can go on where it stopped"
    command = shlex.join(["python", "-m", "mosaic_fast.evaluate", *sys.argv[1:]])
    return f"finished episodes are kept in {arguments.out}; go on with: {command}"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
