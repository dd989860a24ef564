"""What a configuration names, made: environment, policy, chat and engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mosaic_fast.config import Config
from mosaic_fast.distributed import ALONE, World
from mosaic_fast.distributed.exchange import Share, stopped_together
from mosaic_fast.distributed.sharding import Sharding
from mosaic_fast.engine import build_engine, longest_rollout
from mosaic_fast.errors import EngineStoppedError, UserError
from mosaic_fast.learner import Reference
from mosaic_fast.lora import Lora
from mosaic_fast.policy import Policy
from mosaic_fast.policy.checkpoint import UNREADABLE
from mosaic_rollout.agent_loop import AgentLoop, Limits
from mosaic_rollout.branching import Branching
from mosaic_rollout.chat import Chat
from mosaic_rollout.engine import EngineError
from mosaic_rollout.types import Environment, ManagedEngine, Task

Result = TypeVar("Result")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Components:
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

    def save_weights(self, folder: Path | None) -> None:
        """Write the policy as a Hugging Face folder; with LoRA the merged weights, and the adapter in it.

        folder: None on ranks that hand over their part only.
        """
        with self._whole_weights():
            if folder is None:
                return
            if self.lora is None:
                self.policy.save_pretrained(folder)
            else:
                self.lora.save(folder)

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
            groups = self.run(work, version=version)
        except EngineStoppedError as error:
            return Share(stopped=str(error))
        return Share(dict(zip(numbers, groups, strict=True)))

    def _whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self.sharding is None else self.sharding.gathered()

    def run(self, work: Coroutine[None, None, Result], *, version: int | None) -> Result:
        """Run engine work with the policy's current weights as `version`; None: with those it serves.

        EngineStoppedError where the engine fails.
        """

        async def synced() -> Result:
            if version is not None:
                await self.engine.update_weights(version)
            try:
                return await work
            finally:
                await self.engine.release()

        try:
            return asyncio.run(synced())
        except EngineError as error:
            raise EngineStoppedError(f"{error}. The last checkpoint is intact") from None
        finally:
            work.close()  # where it was never begun

    def loop_at(self, temperature: float) -> AgentLoop:
        """The agent loop at another sampling temperature; 0 is greedy."""
        loop = self.loop
        return replace(loop, temperature=temperature)


@dataclass(frozen=True)
class GroupPlan:
    """How groups of rollouts are played: the arguments of `AgentLoop.groups` that tasks have in common."""

    group_size: int
    seed: int
    branching: Branching = "independent"
    gate_contrast: bool = False


async def _nothing() -> None:
    pass


def model_folder(path: str) -> Path:
    """The folder a `model.path` means."""
    return Path(str(files("mosaic_fast").joinpath("embedded"))) if path == "embedded" else Path(path)


def build_components(
    config: Config,
    weights: Path,
    scratch: Path | None = None,
    *,
    base: Path | None = None,
    world: World = ALONE,
) -> Components:
    """Everything of a run, with the model of folder `weights`. Raises UserError for what is missing.

    scratch: a folder for an engine's own files; without one, a temporary folder. Close the engine at the end.
    base: given to train, the folder that training starts from. With LoRA the model is that one, with the
        adapter of `weights`, or with a new one where `weights` is the base itself.
    """
    if world.size > 1 and config.engine.colocated:
        raise UserError(
            "engine.colocated shares one GPU between one trainer and its server; several ranks need "
            "engine.kind = 'local', or servers with GPUs of their own in engine.urls"
        )
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    environment = build_environment(config)
    tokenizer = _load_tokenizer(weights)
    chat = Chat(tokenizer, teach_loop=config.rollout.teach_loop)
    if base is not None and config.model.lora_rank:
        policy = load_policy(config, base, world=world)
        lora = Lora(policy.model, config.model, config.seed)
        if weights != base:
            lora.load(weights)
    else:
        policy, lora = load_policy(config, weights, world=world), None
    if config.model.activation_checkpointing:
        checkpoint_activations(policy.model)
    sharding = None
    if world.size > 1:
        sharding = Sharding(policy, world, device_of(config), master_weights=config.optim.master_weights)
    with nullcontext() if sharding is None else sharding.gathered():  # a local engine tries the model
        engine = build_engine(config, policy, lora, scratch)
    rollout = config.rollout
    limits = Limits(rollout.max_steps, rollout.max_step_tokens, longest_rollout(config, policy))
    loop = AgentLoop(
        engine, chat, environment, limits, rollout.temperature, tool_timeout_s=config.env.tool_timeout_s
    )
    local = config.engine.kind == "local"
    return Components(tokenizer, policy, engine, loop, lora, world, sharding, local)


def checkpoint_activations(model: PreTrainedModel, *, reentrant: bool = False) -> None:
    """Have transformers run each layer again in the backward pass; the method has two names."""
    name = "activation_checkpointing_enable"  # transformers 5.17 has the other one only
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": reentrant})


def build_reference(config: Config, initial: Path, components: Components) -> Reference | None:
    """The policy as training began, where the loss reads it; with LoRA, the policy without its adapter."""
    if not config.loss.needs_reference:
        return None
    if components.lora is not None:
        return Reference(components.policy, components.lora.off)
    world = components.world
    policy = load_policy(config, initial, trainable=False, world=world)
    if world.size == 1:
        return Reference(policy)
    return Reference(policy, Sharding(policy, world, device_of(config)).no_backward)


def build_environment(config: Config) -> Environment:
    """The environment that `env.name` names; imported only then."""
    env = config.env
    if env.name == "agentdojo":
        from mosaic_rollout.environments.agentdojo import AgentDojoEnvironment

        return AgentDojoEnvironment(
            env.suites or ("banking", "slack"),
            heldout_suites=env.heldout_suites,
            attack=env.attack or "important_instructions_no_names",
            max_observation_chars=env.max_observation_chars,
            demonstrations=env.demonstrations,
        )
    if env.name == "bfcl":
        from mosaic_rollout.environments.bfcl import BfclEnvironment

        return BfclEnvironment(
            env.suites or ("multi_turn_base",),
            heldout_suites=env.heldout_suites,
            max_observation_chars=env.max_observation_chars,
        )
    if env.name == "asb":
        from mosaic_rollout.environments.asb import AsbEnvironment

        return AsbEnvironment(
            env.suites, heldout_suites=env.heldout_suites, attack=env.attack or "observation"
        )
    if env.name == "agent_safetybench" and env.tasks is not None:
        from mosaic_rollout.environments.agent_safetybench import AgentSafetyBenchEnvironment

        return AgentSafetyBenchEnvironment(
            Path(env.tasks),
            Path(env.heldout_tasks) if env.heldout_tasks else None,
            max_observation_chars=env.max_observation_chars,
        )
    if env.name == "agentharm" and env.tasks is not None:
        from mosaic_rollout.environments.agentharm import AgentHarmEnvironment

        return AgentHarmEnvironment(
            Path(env.tasks), env.suites, max_observation_chars=env.max_observation_chars
        )
    if env.name == "privacylens" and env.tasks is not None:
        from mosaic_rollout.environments.privacylens import PrivacyLensEnvironment

        return PrivacyLensEnvironment(Path(env.tasks))
    if ":" in env.name:
        from mosaic_rollout.environments.custom import load_environment

        return load_environment(
            env.name,
            env.tasks,
            env.heldout_tasks,
            max_observation_chars=env.max_observation_chars,
        )
    from mosaic_rollout.environments.world import WorldEnvironment

    return WorldEnvironment()


def load_policy(config: Config, weights: Path, *, trainable: bool = True, world: World = ALONE) -> Policy:
    """The policy of a folder, in the configured precision and place; frozen if it is the reference.

    One of several ranks loads it into ordinary memory: `Sharding` moves the rank's part.
    """
    device = torch.device("cpu") if world.size > 1 else device_of(config)
    return Policy.from_pretrained(
        weights, dtype=_DTYPES[config.model.dtype], device=device, trainable=trainable
    )


def device_of(config: Config) -> torch.device:
    """The device of `model.device`. The embedded model is faster on a CPU than on a GPU."""
    device = config.model.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device is 'cuda', but PyTorch finds no GPU; use 'auto' or 'cpu'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and config.model.path != "embedded" else "cpu"
    return torch.device(device)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise UserError(f"model.path: there is no folder {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, *UNREADABLE) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.path: {folder} has no usable tokenizer ({reason})") from None
    if tokenizer is None:
        raise UserError(f"model.path: {folder} has no tokenizer; put tokenizer.json there")
    return tokenizer
