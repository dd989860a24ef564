"""What a cold start learns from: conversations of files and demonstrations of an environment, as rollouts."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from mosaic_fast.config import Config
from mosaic_fast.config.config import derived_seed
from mosaic_fast.distributed import World
from mosaic_fast.errors import UserError
from mosaic_fast.run.durable import write_text
from mosaic_fast.setup.build import Setup
from mosaic_fast.setup.plan_writer import PlanWriter
from mosaic_rollout.chat.rewriting import rewritten
from mosaic_rollout.environments.recorded import Recorded, read_conversations
from mosaic_rollout.loop.agent_loop import AgentLoop
from mosaic_rollout.loop.demonstrated import Rewrite, TooLongError, demonstrated
from mosaic_rollout.loop.play import Limits
from mosaic_rollout.types import Episode, Move, Rollout, Step, Task

RECORD = "sft.json"
"""File in a run folder: what its cold start learns from, so that a resume learns from the same."""
_NO_LIMIT = 2**31


@dataclass(frozen=True)
class Demonstrations:
    """The rollouts that are learnt from, and what is to be told of them."""

    rollouts: Sequence[Rollout] = ()
    heldout: Sequence[Rollout] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def record(self) -> dict[str, object]:
        digest = hashlib.sha256()
        for rollout in (*self.rollouts, *self.heldout):
            digest.update(rollout.token_ids.tobytes() + b"|" + rollout.trained.tobytes() + b"|")
        return {"conversations": len(self.rollouts), "sha256": digest.hexdigest()}

    def refuse_others(self, run_folder: Path) -> None:
        """UserError where the run in the folder learnt from others: a resume would be another run."""
        try:
            before = json.loads((run_folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{run_folder / RECORD} cannot be read: {error}") from None
        if before != self.record:
            raise UserError(
                f"the run in {run_folder} learnt from {before}, and [sft] now gives {self.record}: put its "
                "files and the environment's version back, or start a new run"
            )

    def keep(self, run_folder: Path) -> None:
        """sft.json in the run folder; nothing where nothing is learnt from."""
        if self.rollouts:
            write_text(run_folder / RECORD, json.dumps(self.record, indent=1) + "\n")


def recorded_conversations(names: Sequence[str]) -> list[Recorded]:
    """The conversations of files. UserError names file and line of the first that is none."""
    return [found for name in names for found in read_conversations(Path(name))]


def find_demonstrations(
    config: Config,
    setup: Setup,
    recorded: Sequence[Recorded],
    heldout: Sequence[Recorded],
    run_folder: Path,
    world: World,
) -> Demonstrations:
    """Everything that [sft] names, in the policy's tokens; the same on every rank.

    UserError for a conversation that does not fit a rollout or that the chat template cannot write. Of an
    environment's demonstrations those that do not fit, or do not do their task, are left out and counted.
    """
    if not world.is_first:
        world.from_first(None)  # the first rank asks a model for plans, the others find them written
    longest = setup.loop.limits.max_rollout_tokens
    loop = replace(setup.loop, limits=Limits(_NO_LIMIT, longest, longest))
    found = asyncio.run(_all(config, loop, recorded, heldout, run_folder))
    if world.is_first:
        world.from_first(None)
    return found


async def _all(
    config: Config,
    loop: AgentLoop,
    recorded: Sequence[Recorded],
    heldout: Sequence[Recorded],
    run_folder: Path,
) -> Demonstrations:
    async with AsyncExitStack() as stack:
        writer: PlanWriter | None = None
        rewrite: Rewrite = _unchanged
        if config.sft.plans == "llm":
            writer = await stack.enter_async_context(PlanWriter(config.judge, run_folder))
            rewrite = writer.write
        elif config.sft.rewriting != "none":
            rewrite = _by_template(config.sft.checked_tools)
        rollouts = list(await asyncio.gather(*(_recorded(loop, one, rewrite) for one in recorded)))
        apart = await asyncio.gather(*(_recorded(loop, one, rewrite) for one in heldout))
        notes = [f"{len(rollouts)} conversations of files"] if rollouts else []
        if config.sft.demonstrations:
            own, left_out = await _of_environment(config, loop, rewrite)
            rollouts += own
            why = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            without = f"; left out: {why}" if why else ""
            notes.append(f"{len(own)} demonstrations of {loop.environment.name}{without}")
        if not rollouts:
            raise UserError(f"sft.demonstrations: nothing is left to learn from; {'; '.join(notes)}")
        learnt = {rollout.token_ids.tobytes() for rollout in rollouts}
        for one, rollout in zip(heldout, apart, strict=True):
            if rollout.token_ids.tobytes() in learnt:
                raise UserError(f"{one.where}: this conversation is held out, and learnt from as well")
        if writer is not None:
            notes.append(writer.in_words())
    unknown, taught = loop.chat.tokenizer.unk_token_id, [r.token_ids[r.trained] for r in rollouts]
    lost = sum(int((ids == unknown).sum()) for ids in taught) if unknown is not None else 0
    if lost and unknown not in loop.chat.stop_token_ids:
        notes.append(f"{lost} trained tokens are the tokenizer's unknown one: it lacks what was said there")
    passes = config.steps * config.sft.per_step / len(rollouts)
    tokens = sum(map(len, taught))
    notes.append(
        f"learning from {len(rollouts)} conversations, {tokens} trained tokens, {passes:.2g} times each in "
        f"{config.steps} steps of {config.sft.per_step}"
    )
    if not config.env.eval_tasks and not apart:
        notes.append("nothing is evaluated: set env.eval_tasks, or sft.heldout_conversations")
    return Demonstrations(rollouts, apart, notes)


async def _recorded(loop: AgentLoop, recorded: Recorded, rewrite: Rewrite) -> Rollout:
    try:
        return await demonstrated(loop, recorded.task, recorded.episode(), rewrite)
    except TooLongError as error:
        raise UserError(
            f"{recorded.where}: {error}; raise rollout.max_rollout_tokens, or shorten the conversation"
        ) from None
    except UserError as error:
        raise UserError(f"{recorded.where}: {error}") from None


async def _of_environment(
    config: Config, loop: AgentLoop, rewrite: Rewrite
) -> tuple[list[Rollout], Counter[str]]:
    """The demonstrations that do their task, and how many were left out for what reason."""
    environment, left_out = loop.environment, Counter[str]()
    drawn = environment.sample(
        "train", config.sft.demonstrations, derived_seed(config.seed, "demonstrations", 0)
    )
    tasks = list({task.task_id: task for task in drawn}.values())

    async def one(task: Task) -> Rollout | None:
        try:
            rollout = await demonstrated(loop, task, environment.reset(task), rewrite)
        except TooLongError:
            left_out["longer than rollout.max_rollout_tokens"] += 1
            return None
        done = rollout.status == "refused" if task.kind == "harmful" else rollout.verdict.done
        if rollout.verdict.harm or not done:
            left_out["that do not do their task"] += 1
            return None
        return rollout

    found = await asyncio.gather(*map(one, tasks))
    return [rollout for rollout in found if rollout is not None], left_out


async def _unchanged(episode: Episode, steps: Sequence[Step], move: Move) -> Move:
    return move


def _by_template(checked_tools: Sequence[str]) -> Rewrite:
    async def write(episode: Episode, steps: Sequence[Step], move: Move) -> Move:
        return rewritten(move, checked_tools)

    return write
