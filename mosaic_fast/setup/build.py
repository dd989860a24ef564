"""Makes what a configuration names: environment, policy, chat and engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from mosaic_fast.config import Config, RolloutConfig
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.distributed.exchange import Share, stopped_together
from mosaic_fast.distributed.sharding import Sharding
from mosaic_fast.errors import EngineStoppedError, UserError
from mosaic_fast.learner.learner import Reference
from mosaic_fast.learner.lora import Lora
from mosaic_fast.policy import Policy
from mosaic_fast.policy.checkpoint import check_saved, weights_of
from mosaic_fast.policy.folder import check_config, check_folder
from mosaic_fast.policy.layout import checkpoint_activations
from mosaic_fast.run.interrupt import Interrupt, Stopped
from mosaic_fast.setup.engine import build_engine, longest_rollout
from mosaic_fast.setup.environment import build_environment
from mosaic_fast.setup.gpus import check_backends, server_gpus
from mosaic_fast.setup.model_folder import (
    check_vocabulary,
    device_of,
    end_tokens,
    load_policy,
    load_tokenizer,
)
from mosaic_rollout.chat.chat import Chat
from mosaic_rollout.chat.own_format import load_call_format
from mosaic_rollout.engine import EngineError
from mosaic_rollout.loop.agent_loop import AgentLoop, Branching, Limits
from mosaic_rollout.types import Environment, ManagedEngine, Task

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class _Playing:
    """Engine work that is under way in some thread, kept so that it can be cancelled."""

    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[object]


@dataclass(frozen=True)
class Setup:
    """Everything a run plays with. A local engine and the policy share one model.

    On several ranks each has its local engine and plays its share of a step's groups; servers are asked by
    the first rank alone. Where nothing else is said, every rank has to call a method when one does.
    """

    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    engine: ManagedEngine
    loop: AgentLoop
    lora: Lora | None = None
    world: World = ALONE
    sharding: Sharding | None = None  # None: the weights are whole
    engine_is_local: bool = True
    interrupt: Interrupt | None = None  # None: signals are somebody else's
    _playing: list[_Playing] = field(default_factory=list)  # under way, in whatever thread

    def save_weights(self, folder: Path | None, *, check: bool = False) -> None:
        """Write the policy as a Hugging Face folder; with LoRA the merged weights, and the adapter in it.

        folder: None on ranks that hand over their part only. check: open what was written, and raise
        UserError where it is not a model with these very weights.
        """
        with self._whole_weights():
            if folder is None:
                return
            if self.lora is not None:
                self.lora.save(folder, check=check)
                return
            self.policy.save_pretrained(folder)
            if check:
                check_saved(folder, weights_of(self.policy.model))

    def publish(self, version: int) -> None:
        """Have the engine serve the policy's current weights as `version`."""
        reason = ""
        with self._whole_weights():
            if self.engine_is_local or self.world.is_first:
                try:
                    self.run(_nothing(), version=version)
                except EngineStoppedError as error:
                    reason = str(error)
        stopped_together(self.world, [str(one) for one in self.world.gather(reason)])

    def play(self, loop: AgentLoop, tasks: Sequence[Task], plan: GroupPlan, *, version: int | None) -> Share:
        """This rank's share of a step's groups, by the current weights as `version`; None: by those served.

        Without a version it calls no other rank, so it may run beside training.
        """
        numbers = list(range(len(tasks)))
        if self.engine_is_local or self.world.size == 1:
            with self._whole_weights():
                own = numbers[self.world.rank :: self.world.size]
                return self._play(loop, tasks, own, plan, version)
        if version is not None:
            self.publish(version)
        return self._play(loop, tasks, numbers if self.world.is_first else [], plan, None)

    def _play(
        self, loop: AgentLoop, tasks: Sequence[Task], numbers: list[int], plan: GroupPlan, version: int | None
    ) -> Share:
        work = loop.groups(
            [tasks[number] for number in numbers],
            group_size=plan.group_size,
            branching=plan.branching,
            seed=plan.seed,
            gate_contrast=plan.gate_contrast,
            group_ids=numbers,
        )
        try:
            with nullcontext() if self.interrupt is None else self.interrupt.abandonable():
                groups = self.run(work, version=version)
        except EngineStoppedError as error:
            abandoned = self.interrupt is not None and self.interrupt.requested
            return Share(abandoned=True) if abandoned else Share(stopped=str(error))
        except Stopped:
            return Share(abandoned=True)
        finally:
            work.close()  # where it was never begun
        return Share(dict(zip(numbers, groups, strict=True)))

    def _whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self.sharding is None else self.sharding.gathered()

    def run(self, work: Coroutine[None, None, Result], *, version: int | None) -> Result:
        """Run engine work with the policy's current weights as `version`; None: with those it serves.

        EngineStoppedError where the engine fails.
        """

        async def synced() -> Result:
            task = asyncio.current_task()
            assert task is not None
            playing = _Playing(asyncio.get_running_loop(), task)
            self._playing.append(playing)
            try:
                if version is not None:
                    await self.engine.update_weights(version)
                try:
                    return await work
                finally:
                    await self.engine.release()
            finally:
                self._playing.remove(playing)

        try:
            return asyncio.run(synced())
        except EngineError as error:
            raise EngineStoppedError(f"{error}. The last checkpoint is intact") from None
        finally:
            work.close()  # where it was never begun

    def abandon(self) -> None:
        """Cancel what is played in another thread."""
        for playing in list(self._playing):
            playing.loop.call_soon_threadsafe(playing.task.cancel)

    def loop_at(self, temperature: float) -> AgentLoop:
        """The run's agent loop with another sampling temperature; 0 is greedy."""
        loop = self.loop
        return replace(loop, temperature=temperature)


@dataclass(frozen=True)
class GroupPlan:
    """How groups of rollouts are played: the arguments of `AgentLoop.groups` that tasks have in common."""

    group_size: int
    seed: int
    branching: Branching = "independent"
    gate_contrast: bool = False


def build_chat(tokenizer: PreTrainedTokenizerBase, folder: Path, rollout: RolloutConfig) -> Chat:
    """The chat of a model's folder, as `rollout` has it. UserError where its template cannot be used."""
    return Chat(
        tokenizer,
        teach_loop=rollout.teach_loop,
        end_token_ids=end_tokens(folder),
        today=rollout.today,
        call_format=load_call_format(rollout.call_format),
    )


async def _nothing() -> None:
    pass


def build_setup(
    config: Config,
    weights: Path,
    scratch: Path | None = None,
    *,
    base: Path | None = None,
    world: World = ALONE,
    interrupt: Interrupt | None = None,
    environment: Environment | None = None,
    policy: Policy | None = None,
) -> Setup:
    """Everything of a run, with the model of folder `weights`. Raises UserError for what is missing.

    scratch: a folder for an engine's own files; without one, a temporary folder. Close the engine at the end.
    base: given to train, the folder that training starts from. With LoRA the model is that one, with the
        adapter of `weights`, or with a new one where `weights` is the base itself.
    environment: what is played instead of what `config.env` names.
    policy: what samples instead of the weights of the folder, of which only the tokenizer is then read.
    """
    if world.size > 1 and config.engine.colocated:
        raise UserError(
            "engine.colocated shares one GPU between one trainer and its server; several ranks need "
            "engine.kind = 'local', or servers with GPUs of their own in engine.urls"
        )
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    check_backends(config, device_of(config))
    gpus = server_gpus(config, world)
    environment = environment or build_environment(config)
    try:
        check_folder(weights) if policy is None else check_config(weights)
    except UserError as error:
        raise UserError(f"model.path: {error}") from None
    tokenizer = load_tokenizer(weights)
    chat = build_chat(tokenizer, weights, config.rollout)
    lora = None
    if policy is not None:
        pass  # it is loaded already
    elif base is not None and config.model.lora_rank:
        policy = load_policy(config, base, world=world)
        lora = Lora(policy.model, config.model, config.seed)
        if weights != base:
            lora.load(weights)
    else:
        policy = load_policy(config, weights, world=world)
    check_vocabulary(tokenizer, policy, weights)
    if config.model.activation_checkpointing:
        checkpoint_activations(policy.model)
    sharding = None
    if world.size > 1:
        sharding = Sharding(policy, world, device_of(config), master_weights=config.optim.master_weights)
    with nullcontext() if sharding is None else sharding.gathered():  # a local engine tries the model
        engine = build_engine(config, policy, lora, scratch, gpus=gpus)
    rollout = config.rollout
    limits = Limits(rollout.max_steps, rollout.max_step_tokens, longest_rollout(config, policy))
    loop = AgentLoop(
        engine, chat, environment, limits, rollout.temperature, tool_timeout_s=config.env.tool_timeout_s
    )
    local = config.engine.kind == "local"
    return Setup(tokenizer, policy, engine, loop, lora, world, sharding, local, interrupt)


def build_reference(config: Config, initial: Path, setup: Setup) -> Reference | None:
    """The policy as training began, where the loss reads it; with LoRA, the policy without its adapter."""
    if not config.loss.needs_reference:
        return None
    if setup.lora is not None:
        return Reference(setup.policy, setup.lora.off)
    world = setup.world
    policy = load_policy(config, initial, trainable=False, world=world)
    if world.size == 1:
        return Reference(policy)
    return Reference(policy, Sharding(policy, world, device_of(config)).no_backward)
