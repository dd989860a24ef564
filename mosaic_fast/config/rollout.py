"""[env], [engine], [rollout]: which tasks are played, by what, and how."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mosaic_fast.config.section import Count, CountOrZero, NonNegative, Positive, Section

ENVIRONMENTS = ("world", "agentdojo", "bfcl", "asb", "agent_safetybench", "agentharm", "privacylens")
"""Names of `env.name` beside module:Class."""
EVALUATION_ONLY = ("agentharm", "privacylens")
"""Their authors ask that nothing be trained on them."""
HAS_SUITES = ("agentdojo", "bfcl", "asb", "agentharm")
NEEDS_TASKS = {
    "agent_safetybench": "its released_data.json",
    "agentharm": "the folder of its data set",
    "privacylens": "its main_data.json",
}
"""Environment -> the data its user has to bring."""


class EnvConfig(Section):
    """The tasks."""

    name: str = "world"
    """`world`: simulated tools; a benchmark's name; `module:Class`: your own; `agent:module:function`:
    a program that asks the policy itself (docs/environments.md)."""
    tasks: str | None = None
    """Your own: JSON Lines file of tasks; some benchmarks: their data, which you have to bring;
    `org/name@revision:file.jsonl`: of the hub."""
    heldout_tasks: str | None = None
    """Your own: the held-out tasks; without it every fifth row of env.tasks is held out."""
    suites: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """agentdojo: suites (banking, slack); bfcl: categories (multi_turn_base); asb: agents (all);
    agentharm: harmful, benign, chat (the first two)."""
    heldout_suites: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Suites that are the held-out split; default: a quarter of the tasks of env.suites."""
    attack: str | None = None
    """agentdojo: its attack (important_instructions_no_names); asb: observation or prompt (observation)."""
    demonstrations: CountOrZero = 0
    """agentdojo: solved training tasks that open every conversation, for models too small to be told."""
    max_observation_chars: Count = 16_000
    """Benchmarks, module:Class: longer tool outputs are cut there, and say so."""
    tool_timeout_s: NonNegative = 0.0
    """Seconds until a tool call becomes an error observation; 0: no limit, for bitwise repeatable runs."""
    agent_timeout_s: Positive = 600.0
    """agent: seconds until an episode is cut off, with the harm that it may have tried."""
    eval_tasks: CountOrZero = 300
    """Held-out tasks, each played once, before and after training; all if there are fewer; 0: neither."""
    eval_every: CountOrZero = 0
    """Evaluate every so many steps as well, on a third of eval_tasks or all there are; 0: never."""

    @model_validator(mode="after")
    def _fits_the_name(self) -> EnvConfig:
        own = re.fullmatch(r"(agent:)?[\w.]+:\w+", self.name) is not None
        if self.name not in ENVIRONMENTS and not own:
            raise ValueError(
                f"env.name {self.name!r} is none of {', '.join(ENVIRONMENTS)}, nor your own as module:Class, "
                "for example bank:Bank for the class Bank in bank.py"
            )
        if self.tasks and not own and self.name not in NEEDS_TASKS:
            raise ValueError(f"env.tasks belongs to an environment of your own, env.name is {self.name!r}")
        if self.name.startswith("agent:") and not self.tasks:
            raise ValueError(
                f"env.name {self.name!r} needs env.tasks, a JSON Lines file with one task a line"
            )
        if self.name in NEEDS_TASKS and not self.tasks:
            raise ValueError(f"env.name {self.name!r} needs env.tasks, {NEEDS_TASKS[self.name]}")
        for key in ("suites", "heldout_suites"):
            if getattr(self, key) and self.name not in HAS_SUITES:
                raise ValueError(f"env.{key} belongs to {', '.join(HAS_SUITES)}; env.name is {self.name!r}")
        if self.heldout_suites and self.name in EVALUATION_ONLY:
            raise ValueError(f"env.heldout_suites: all of {self.name} is held out; name parts in env.suites")
        if self.attack is not None and self.name not in ("agentdojo", "asb"):
            raise ValueError(f"env.attack belongs to agentdojo and asb; env.name is {self.name!r}")
        return self


class AttacksConfig(Section):
    """In which words the orders of injected tasks come in training; an evaluation has its own."""

    pick: Literal["off", "uniform", "bandit"] = "off"
    """`off`: as the task has it; `uniform`: any of a set; `bandit`: what succeeds is likelier."""
    names: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """The set: some of the environment's own attacks; default: all of its training split."""
    file: str | None = None
    """Another set: a template a line with {goal} in it, or .jsonl with a JSON string a line."""
    memory: float = Field(default=0.9, gt=0.0, le=1.0)
    """bandit: what remains of a count after a step, since the policy changes under the attacker."""

    @model_validator(mode="after")
    def _one_set(self) -> AttacksConfig:
        if self.pick == "off" and (self.names or self.file):
            raise ValueError("attacks.names and attacks.file need attacks.pick = 'uniform' or 'bandit'")
        if self.names and self.file:
            raise ValueError("attacks.names and attacks.file both say which attacks; leave one out")
        return self


_NO_KEY = "no key belongs in a configuration, and a server on 127.0.0.1 needs none"
_NOT_FOR_SERVERS = {  # flag of sglang.launch_server -> why it is refused, without its value
    "--host": "--host cannot be set, servers launched here listen on 127.0.0.1 alone; for others start one "
    "yourself and name it in engine.urls",
    "--api-key": _NO_KEY,
    "--admin-api-key": _NO_KEY,
    "--trust-remote-code": "--trust-remote-code cannot be set, code in a model's folder is never run",
    "--config": "--config cannot be set, its file could hold any of the flags that are refused here; name "
    "the flags themselves",
}


class EngineConfig(Section):
    """What samples the rollouts."""

    kind: Literal["local", "sglang"] = "local"
    """`local`: in process, PyTorch, with a radix-tree cache. `sglang`: SGLang servers (docs/sglang.md)."""
    max_batch: Count = 96
    """Sequences decoded at once (sglang: by each server)."""
    max_cached_tokens: Count = 200_000
    """Tokens the prefix cache may hold, the least recently used go first (sglang: CPU servers only)."""
    python: str = ".venv-sglang/bin/python"
    """sglang: Python of the environment to launch servers with; `make sglang` makes this one."""
    urls: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """sglang: servers that run already, instead of launching any; they must see the run folder's files."""
    servers: Count = 1
    """sglang: servers to launch; a task's rollouts all go to one of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """sglang: where launched servers run; auto takes a GPU where PyTorch finds one."""
    args: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """sglang: further flags for launched servers, as `sglang.launch_server` takes them."""
    deterministic: bool = False
    """sglang: SGLang's deterministic mode, with draws keyed by seed, rollout and position."""
    weights: Literal["disk", "tensor", "distributed"] = "disk"
    """sglang: how updated weights reach servers: a folder; memory shared on one machine; a process group."""
    verify_weights: bool = False
    """sglang: prove by checksums after every update that the servers have the trained weights."""
    colocated: bool = False
    """sglang: servers give their memory back while the trainer computes, for one GPU that does both."""
    max_inflight_tokens: CountOrZero = 0
    """sglang: tokens asked of a server at once, prompt to compute and to sample; 0: what its cache holds."""
    request_timeout_s: Positive = 600.0
    """sglang: seconds a request may take before it is sent again."""
    hang_timeout_s: Positive = 60.0
    """sglang: seconds without any sign of life after which a launched server is killed and started anew."""
    startup_timeout_s: Positive = 600.0
    """sglang: seconds a server may take to start."""

    @model_validator(mode="after")
    def _servers_stay_private(self) -> EngineConfig:
        """A server takes whatever weights it is told to load, from anybody who can reach it."""
        for flag in self.args:
            name = flag.partition("=")[0].replace("_", "-")
            for long, why in _NOT_FOR_SERVERS.items():  # argparse takes abbreviations, the last one of a flag
                if len(name) > 3 and long.startswith(name):
                    raise ValueError(f"engine.args: {why}")
        return self


class RolloutConfig(Section):
    """How tasks are played."""

    prompts_per_step: Count = 16
    """Tasks a training step."""
    group_size: int = Field(default=4, ge=2, le=64)
    """Rollouts a task, compared pair by pair (n; 4 is reported of the paper)."""
    branching: Literal["independent", "fork_at_check", "fork_at_step"] = "independent"
    """Where rollouts of a group begin to differ: at the prompt (as in GRPO), after a plan, or at a step."""
    gate_contrast: bool = False
    """fork_at_check: take the gate both ways and train it with its all-action gradient (docs/method.md)."""
    max_staleness: CountOrZero = 0
    """sglang: updates that rollouts may be old, sampled while earlier steps train; 0: exactly on policy."""
    temperature: Positive = 1.0
    """Sampling temperature; the trainer's log-probs use the same one."""
    max_steps: Count = 6
    """Turns of the policy in one rollout; default by the kind of model, 10 for others."""
    max_step_tokens: Count = 72
    """Sampled tokens of one turn; default by the kind of model, 1024 for others."""
    max_rollout_tokens: Count = 512
    """Tokens of a whole rollout, prompt and observations included; by the kind of model, 8192 for others."""
    teach_loop: bool = False
    """Teach plan, check and act in the system message; by the kind of model, true for others."""
    call_format: Annotated[str, Field(pattern=r"^([\w-]+|[\w.]+:\w+)$")] = "auto"
    """How calls are written: auto, as the chat template does; hermes, phi, llama, xlam, mistral,
    qwen3-coder or pythonic; your own: `module:Class` (docs/environments.md)."""
    date: str | None = None
    """The date, as 2026-07-01, that chat templates see which ask for one; default: the day of the start."""

    @property
    def today(self) -> datetime.date | None:
        """The date that templates see; None: nothing is said of it."""
        return None if self.date is None else datetime.date.fromisoformat(self.date)

    @field_validator("date")
    @classmethod
    def _a_day(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                datetime.date.fromisoformat(value)
            except ValueError:
                raise PydanticCustomError("date", "it is no date; write it as 2026-07-01") from None
        return value

    @model_validator(mode="before")
    @classmethod
    def _whole_distribution(cls, values: object) -> object:
        """Named here, since a key that does not exist would not say why."""
        refused = [name for name in ("top_p", "top_k") if isinstance(values, dict) and name in values]
        if refused:
            raise ValueError(
                f"{refused[0]} cannot be used in training: the trainer's log-probs are those of the whole "
                "distribution, so tokens must be sampled from it; use rollout.temperature"
            )
        return values
