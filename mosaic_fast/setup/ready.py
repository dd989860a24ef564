"""A run made ready: from its folder and configuration to all that its steps need, as it was left."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from mosaic_fast.config import Config
from mosaic_fast.config.kinds import defaults_in_words
from mosaic_fast.config.presets import preset_in_words
from mosaic_fast.distributed import World
from mosaic_fast.learner.checkpoint import (
    Progress,
    checkpoint_to_load,
    load_training_state,
    other_versions,
    step_of,
)
from mosaic_fast.learner.execution.cost import cost_model_of_run, keep_cost_model
from mosaic_fast.learner.learner import Learner
from mosaic_fast.losses import check_loss
from mosaic_fast.preferences import Judge, build_judge, keep_judge_record, probe_judge
from mosaic_fast.preferences.reward import build_reward
from mosaic_fast.run import durable
from mosaic_fast.run.folder import RunFolder
from mosaic_fast.run.interrupt import Interrupt
from mosaic_fast.run.trackers import require_trackers
from mosaic_fast.setup.build import Setup, build_reference, build_setup
from mosaic_fast.setup.demonstrations import Demonstrations, find_demonstrations, recorded_conversations
from mosaic_fast.setup.engine import why_shorter
from mosaic_fast.setup.engine_proof import proof_rows
from mosaic_fast.setup.given import Given
from mosaic_fast.setup.gpus import why_slow
from mosaic_fast.setup.memory import microbatch_tokens
from mosaic_fast.setup.model_folder import model_folder


@dataclass(frozen=True)
class ReadyRun:
    """The parts of a run, and how far it has come."""

    config: Config
    folder: RunFolder
    setup: Setup
    learner: Learner
    judge: Judge | None  # of the first rank
    progress: Progress
    notes: list[str]  # to tell the user before the first step
    demonstrations: Demonstrations  # of a cold start; of another run none


def with_microbatches(config: Config, world: World) -> Config:
    """The configuration with the size of a micro-batch that the first rank's memory decides, if it is 0."""
    if config.forest.tokens_per_microbatch:
        return config
    tokens = world.from_first(microbatch_tokens(config) if world.is_first else None)
    return config.model_copy(
        update={"forest": config.forest.model_copy(update={"tokens_per_microbatch": tokens})}
    )


def _microbatches_in_words(config: Config, sized: Config) -> str | None:
    if config.forest.tokens_per_microbatch:
        return None
    return f"micro-batches of {sized.forest.tokens_per_microbatch} tokens, by the memory there is (--dry-run)"


def ready_run(
    folder: RunFolder, config: Config, world: World, interrupt: Interrupt, given: Given
) -> ReadyRun:
    """Build the parts of a run, from its last checkpoint where it has one. The folder is written to last.

    UserError for what a user can mend; nothing of the run on disk has changed then.
    """
    checkpoint = checkpoint_to_load(folder.checkpoints, world)
    if world.is_first:
        given.refuse_another(folder.path)
    supervised = config.sft.is_set
    recorded = recorded_conversations(config.sft.conversations)
    heldout = recorded_conversations(config.sft.heldout_conversations)
    judges = world.is_first and not supervised
    judge = given.judge or (build_judge(config.judge, folder.path) if judges else None)
    check_loss(config)  # the user's own code is looked at before a model is loaded
    build_reward(config.reward)
    require_trackers(config)
    initial = model_folder(config.model.path)
    if checkpoint is None or step_of(checkpoint) < config.steps:
        probe_judge(judge)
    weights, scratch = checkpoint or initial, folder.path / "sglang"
    setup = build_setup(
        config, weights, scratch,
        base=initial, world=world, interrupt=interrupt, environment=given.environment,
    )  # fmt: skip
    found = Demonstrations()
    if supervised:
        found = find_demonstrations(config, setup, recorded, heldout, folder.path, world)
        found.refuse_others(folder.path)
    cost = cost_model_of_run(folder.path, config.forest.cost_model)
    reference = build_reference(config, initial, setup)
    sized = with_microbatches(config, world)
    learner = Learner(setup.policy, reference, sized, cost, world, setup.sharding)
    torch.manual_seed(config.seed)  # nothing draws from it today; a checkpoint holds its state all the same
    progress = load_training_state(checkpoint, learner.optimizer) if checkpoint else Progress()
    policy = setup.policy
    notes = [
        _microbatches_in_words(config, sized),
        defaults_in_words(config),
        preset_in_words(config),
        policy.admission.in_words(),
        why_shorter(config, policy),
        why_slow(config),
        *found.notes,
    ]
    if checkpoint is not None:
        notes.append(other_versions(checkpoint))
    if world.is_first:
        rows = progress.step - 1 if progress.unevaluated else progress.step
        notes += [change.said() for change in folder.open(config, progress.step, rows)]
        if not folder.is_locked:
            notes.append(f"{folder.path} is on storage without locks: nothing keeps a second run out of it")
        with folder.writing("given.json"):
            given.keep(folder.path)
        with folder.writing("cost.toml"):
            keep_cost_model(cost, folder.path)
        with folder.writing("proof.json"):
            table = json.dumps(proof_rows(policy, config), indent=1)
            durable.write_text(folder.path / "proof.json", table + "\n")
        with folder.writing("sft.json"):
            found.keep(folder.path)
        with folder.writing("judge.json"):
            keep_judge_record(judge, folder.path)
    told = [note for note in notes if note]
    return ReadyRun(config, folder, setup, learner, judge, progress, told, found)
