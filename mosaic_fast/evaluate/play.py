"""Plays the episodes of an evaluation, many at once, and reports each the moment it ends.

`evaluate_policy` is the evaluation inside a training run: fixed held-out tasks, by the current weights.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mosaic_fast.config.config import derived_seed
from mosaic_fast.evaluate.arguments import Arguments, flag
from mosaic_fast.evaluate.graders import Grader, grader_of
from mosaic_fast.evaluate.judging import IN_MEMORY, EvaluationJudge
from mosaic_fast.evaluate.results import SuiteResult, suite_result
from mosaic_fast.evaluate.store import Finished, Key
from mosaic_fast.evaluate.targets import Suite, Target, api_key, api_key_variable
from mosaic_fast.evaluate.tasks import evaluation_tasks
from mosaic_fast.preferences.episode_counts import EpisodeCounts, Played, episode_counts
from mosaic_fast.run.metrics import Rate, rollout_rates
from mosaic_fast.run.trajectories import opening, readable_step
from mosaic_rollout.endpoint.parameters import Parameters
from mosaic_rollout.environments.attacks import Attack
from mosaic_rollout.loop.agent_loop import Limits
from mosaic_rollout.types import Completion, Engine, Environment, Request, Rollout, Task

if TYPE_CHECKING:
    from mosaic_fast.policy import Policy
    from mosaic_fast.setup.build import Setup


def evaluate_policy(
    setup: Setup, split: str, count: int, *, temperature: float, version: int = 0, seed: int = 0
) -> dict[str, Rate]:
    """Rates of one rollout a task on the tasks of `evaluation_tasks`, by the current weights as `version`."""
    from mosaic_fast.distributed.exchange import all_groups
    from mosaic_fast.setup.build import GroupPlan

    tasks = evaluation_tasks(setup.loop.environment, split, count)
    share = setup.play(setup.loop_at(temperature), tasks, GroupPlan(1, seed), version=version)
    groups = all_groups(setup.world, share, tasks)
    return rollout_rates([rollout for group in groups for rollout in group])


@dataclass(frozen=True)
class Job:
    """One episode to play: which task of which suite, and which sample of it."""

    key: Key
    suite: Suite
    environment: Environment
    task: Task
    attack: Attack | None = None  # the one that the task carries, where attacks are tried one after the other


Report = Callable[[Key, Finished], None]
Player = Callable[[Job, Grader | None], Awaitable[Finished]]
"""Plays a job, and has its suite's grader, if it has one, find the verdict."""


class Follow(Protocol):
    """What of a job is played, where it is more than one episode."""

    def open(self) -> AbstractAsyncContextManager[object]:
        """What it needs while episodes are played."""
        ...

    async def next(self, job: Job) -> Job | None:
        """The job's next episode, asked again after each; None: it has no more."""
        ...


_AllBy = Callable[[Player, int], Coroutine[None, None, None]]
"""Play every job by this player, so many at a time."""


def jobs_of(suite: Suite, environment: Environment, arguments: Arguments) -> list[Job]:
    """Every episode of a suite, task by task."""
    tasks = evaluation_tasks(environment, arguments.split, arguments.tasks)
    return [
        Job(Key(suite.env.name, index, sample), suite, environment, task)
        for index, task in enumerate(tasks)
        for sample in range(arguments.samples)
    ]


def evaluate_target(
    target: Target,
    arguments: Arguments,
    environment: Environment | None = None,
    policy: Policy | None = None,
) -> SuiteResult:
    """The figures of a target's first suite; nothing is shown or kept.

    environment: what is played instead of what the suite names. policy: see `play`.
    """
    from mosaic_fast.setup.environment import build_environment

    suite = target.suites[0]
    jobs = jobs_of(suite, environment or build_environment(target.config), arguments)
    done: dict[Key, Finished] = {}
    play(target, jobs, arguments, done.__setitem__, IN_MEMORY, policy)
    return suite_result(suite.env.name, by_task(suite.env.name, done))


def by_task(suite: str, done: Mapping[Key, Finished]) -> list[list[EpisodeCounts]]:
    """The outcomes of a suite's tasks, each a list of its samples, in the order of the draw."""
    keys = sorted(key for key in done if key.suite == suite and not key.attack)
    tasks: dict[int, list[EpisodeCounts]] = {}
    for key in keys:
        tasks.setdefault(key.index, []).append(done[key].outcome)
    return list(tasks.values())


def play(
    target: Target,
    jobs: Sequence[Job],
    arguments: Arguments,
    report: Report,
    judge_answers: Path,
    policy: Policy | None = None,
    follow: Follow | None = None,
) -> dict[str, tuple[str, ...]]:
    """Play the jobs and report each. UserError or TrainingError where model or judge cannot go on.

    A judge is asked something small before anything is loaded or played.
    judge_answers: where the answers of a judge are kept, if a suite needs one.
    policy: what plays instead of the weights in the target's folder.
    follow: what of each job is played, one episode after the other; else the job itself.
    Returns what endpoint and judge were asked in another way than the options say, where there is such.
    """
    judge = EvaluationJudge(target.judge, judge_answers) if target.judge else None
    if judge is not None:
        asyncio.run(_probe(judge, {job.suite.env.name for job in jobs}))

    def all_by(player: Player, at_once: int) -> Coroutine[None, None, None]:
        return play_all(jobs, player, at_once, report, judge, follow)

    parameters = Parameters(arguments.parameters)
    if target.folder is None:
        asyncio.run(_play_endpoint(target, arguments, parameters, all_by))
    else:
        _play_local(target, arguments, all_by, jobs[0].environment, policy)
    asked = {"endpoint": parameters.changes, "judge": judge.changes if judge else ()}
    return {who: changes for who, changes in asked.items() if changes}


async def _probe(judge: EvaluationJudge, suites: set[str]) -> None:
    async with _graders(suites, judge) as graders:
        for _, grader in sorted(graders.items()):
            await grader.probe()


def _play_local(
    target: Target, arguments: Arguments, all_by: _AllBy, environment: Environment, policy: Policy | None
) -> None:
    from mosaic_fast.setup.build import build_chat, build_setup
    from mosaic_fast.setup.engine import why_shorter

    if target.folder is None:
        raise ValueError("a local target has a folder")
    setup = build_setup(target.config, target.folder, environment=environment, policy=policy)
    if shorter := why_shorter(target.config, setup.policy):
        print(shorter, file=sys.stderr)
    loop = setup.loop_at(arguments.temperature)
    folder, rollouts = target.folder, target.config.rollout
    chats = {  # with the loop taught in the system message, and without
        taught: build_chat(setup.tokenizer, folder, rollouts.model_copy(update={"teach_loop": taught}))
        for taught in (False, True)
    }

    async def one(job: Job, grader: Grader | None) -> Finished:
        group = job.key.index
        engine = _Numbered(loop.engine, group * arguments.samples + job.key.sample, group)
        own = replace(
            loop,
            engine=engine,
            chat=chats[job.suite.rollout.teach_loop],
            environment=job.environment,
            limits=_limits(job.suite, loop.limits.max_rollout_tokens),
            tool_timeout_s=job.suite.env.tool_timeout_s,
        )
        ((rollout,),) = await own.groups(
            [job.task], group_size=1, branching="independent", seed=_seed(arguments, job)
        )
        if grader is not None:
            rollout = replace(rollout, verdict=await grader.grade(rollout))
        return finished(rollout)

    with closing(setup.engine):
        setup.run(all_by(one, target.config.engine.max_batch), version=0)


async def _play_endpoint(
    target: Target, arguments: Arguments, parameters: Parameters, all_by: _AllBy
) -> None:
    from mosaic_rollout.endpoint.client import ChatEndpoint
    from mosaic_rollout.loop.chat_agent import ChatAgent

    endpoint = ChatEndpoint(
        url=target.name,
        model=arguments.model_name or "",
        api_key=api_key(arguments),
        api_key_env=api_key_variable(arguments),
        temperature=arguments.temperature,
        timeout_s=arguments.timeout_s,
        retries=arguments.retries,
        backoff_s=arguments.backoff_s,
        parameters=parameters,
        option=flag,
    )
    agents = {
        suite.env.name: ChatAgent(
            endpoint,
            _limits(suite),
            protocol=arguments.protocol,
            teach_loop=suite.rollout.teach_loop,
            write_tools=arguments.write_tools,
            tool_timeout_s=suite.env.tool_timeout_s,
        )
        for suite in target.suites
    }
    async with endpoint.open() as http:

        async def one(job: Job, grader: Grader | None) -> Finished:
            number = job.key.index * arguments.samples + job.key.sample
            seed = derived_seed(_seed(arguments, job), f"evaluate/{job.key.suite}", number)
            played = await agents[job.key.suite].play(http, job.environment, job.task, seed)
            if grader is not None:
                played = replace(played, verdict=await grader.grade(played))
            return finished(played)

        await all_by(one, arguments.concurrency)


def _seed(arguments: Arguments, job: Job) -> int:
    """The seed of an episode's draws: every attack on a task has its own."""
    return derived_seed(arguments.seed, "attack", job.key.attack) if job.key.attack else arguments.seed


def _limits(suite: Suite, longest_tokens: int | None = None) -> Limits:
    """A suite's limits; `longest_tokens`: what model and engine allow at most."""
    rollout = suite.rollout
    tokens = min(rollout.max_rollout_tokens, longest_tokens or rollout.max_rollout_tokens)
    return Limits(rollout.max_steps, rollout.max_step_tokens, tokens)


async def play_all(
    jobs: Sequence[Job],
    player: Player,
    at_once: int,
    report: Report,
    judge: EvaluationJudge | None = None,
    follow: Follow | None = None,
) -> None:
    """Play jobs in their order, `at_once` at a time. The first failure ends all that are under way."""
    waiting = iter(jobs)

    async def work(graders: Mapping[str, Grader]) -> None:
        for job in waiting:
            if follow is None:
                report(job.key, await player(job, graders.get(job.key.suite)))
                continue
            while (episode := await follow.next(job)) is not None:
                played = await player(episode, graders.get(job.key.suite))
                report(episode.key, replace(played, course={**played.course, **_carried(episode)}))

    async with (
        follow.open() if follow else nullcontext(),
        _graders({job.key.suite for job in jobs}, judge) as graders,
    ):
        workers = [asyncio.create_task(work(graders)) for _ in range(min(at_once, len(jobs)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


@asynccontextmanager
async def _graders(suites: set[str], judge: EvaluationJudge | None) -> AsyncIterator[Mapping[str, Grader]]:
    """Suite -> its grader, with the judge open to them."""
    if judge is None:
        yield {}
        return
    async with judge:
        found = {suite: grader_of(suite, judge) for suite in suites}
        yield {suite: grader for suite, grader in found.items() if grader is not None}


def _carried(job: Job) -> dict[str, object]:
    """The attack that an episode met, for its course."""
    if job.attack is None:
        return {}
    return {"attack": {"number": job.key.attack, "name": job.attack.name, "template": job.attack.template}}


def finished(played: Played) -> Finished:
    """An episode as it is kept: figures, and its course for readers."""
    steps = [readable_step(step) for step in played.steps]
    begun = opening(played) if isinstance(played, Rollout) else {"messages": list(played.messages)}
    course = {**begun, "steps": steps}
    return Finished(played.task.task_id, episode_counts(played), course)


class _Numbered:
    """An engine for one rollout that bears another number: draws and servers go by that number."""

    def __init__(self, engine: Engine, rollout_key: int, group_key: int) -> None:
        self._engine, self._rollout_key, self._group_key = engine, rollout_key, group_key

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        numbered = [
            replace(request, rollout_key=self._rollout_key, group_key=self._group_key) for request in requests
        ]
        return await self._engine.generate(numbered)

    async def update_weights(self, version: int) -> None:
        await self._engine.update_weights(version)

    async def flush(self) -> None:
        await self._engine.flush()
