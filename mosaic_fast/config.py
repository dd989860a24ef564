"""The configuration of a run: one frozen model a section. Importable without torch.

The defaults are the run of `make train`: the embedded model in the embedded world. Every field's text below
is what `--help` prints.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


def is_plain_url(url: str) -> bool:
    """Whether it is an http(s) URL with a host and without a user, a password or white space."""
    try:
        parts = urlsplit(url)
        return (
            re.fullmatch(r"https?://[^@\s]+", url) is not None
            and url.isascii()
            and url.isprintable()
            and re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.]+", parts.hostname or "") is not None
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:  # a port that is no number, a bracket that is not closed
        return False


def _halves(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


class Section(BaseModel):
    """A section refuses keys it does not know, and cannot be changed once made."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: object) -> object:
        """A NUL is in no path or address, and half a surrogate pair (a byte that is no UTF-8) in no file."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and ("\0" in text or (not text.isascii() and _halves(text))):
                raise PydanticCustomError("text", "it has a NUL, or a byte that is no UTF-8")
        return value


class ModelConfig(Section):
    """The policy."""

    path: str = "embedded"
    """Folder of a Hugging Face causal LM (Qwen2, Qwen3, Phi-3/Phi-4, Llama); `embedded`: the one shipped."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and activations. bfloat16 is meant for GPUs; on a CPU it is much slower."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy lives; auto takes a GPU where there is one, except for the embedded model."""
    threads: int = Field(default=1, ge=0)
    """CPU threads of PyTorch; 0: PyTorch's own choice. More than there are idle cores slow a run badly."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and run the layer again in the backward pass: less memory, more time."""
    lora_rank: int = Field(default=0, ge=0)
    """Train low-rank adapters of this rank (needs peft: the extra `lora`); 0: train every weight."""
    lora_alpha: Count | None = None
    """LoRA: adapters are scaled by lora_alpha / lora_rank; default twice the rank."""
    lora_targets: Annotated[tuple[str, ...], Field(strict=False)] = ("all-linear",)
    """LoRA: names of the modules that get an adapter, such as q_proj; `all-linear`: all but the LM head."""


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
    """`world`: simulated tools; a benchmark's name; `module:Class`: your own (docs/environments.md)."""
    tasks: str | None = None
    """module:Class: JSON Lines file of tasks; some benchmarks: their data, which you have to bring."""
    heldout_tasks: str | None = None
    """module:Class: the held-out tasks; without it every fifth row of env.tasks is held out."""
    suites: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """agentdojo: suites (banking, slack); bfcl: categories (multi_turn_base); asb: agents (all);
    agentharm: harmful, benign, chat (the first two)."""
    heldout_suites: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Suites that are the held-out split; default: a quarter of the tasks of env.suites."""
    attack: str | None = None
    """agentdojo: its attack (important_instructions_no_names); asb: observation or prompt (observation)."""
    demonstrations: int = Field(default=0, ge=0)
    """agentdojo: solved training tasks that open every conversation, for models too small to be told."""
    max_observation_chars: Count = 16_000
    """Benchmarks, module:Class: longer tool outputs are cut there, and say so."""
    tool_timeout_s: NonNegative = 0.0
    """Seconds until a tool call becomes an error observation; 0: no limit, for bitwise repeatable runs."""
    eval_tasks: int = Field(default=300, ge=0)
    """Held-out tasks in the evaluation before and after training; 0 leaves both out."""
    eval_every: int = Field(default=0, ge=0)
    """Evaluate during training every so many steps on a third of eval_tasks; 0: never."""

    @model_validator(mode="after")
    def _fits_the_name(self) -> EnvConfig:
        own = re.fullmatch(r"[\w.]+:\w+", self.name) is not None
        if self.name not in ENVIRONMENTS and not own:
            raise ValueError(
                f"env.name {self.name!r} is none of {', '.join(ENVIRONMENTS)}, nor your own as module:Class, "
                "for example bank:Bank for the class Bank in bank.py"
            )
        if self.tasks and not own and self.name not in NEEDS_TASKS:
            raise ValueError(f"env.tasks belongs to an environment of your own, env.name is {self.name!r}")
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


_NOT_FOR_SERVERS = ("--host", "--api-key", "--admin-api-key")


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
    max_inflight_tokens: int = Field(default=0, ge=0)
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
            name = flag.partition("=")[0]
            means = [long for long in _NOT_FOR_SERVERS if len(name) > 3 and long.startswith(name)]
            if "--host" in means:  # argparse takes abbreviations, and the last one of a flag
                raise ValueError(
                    "engine.args: --host cannot be set, servers launched here listen on 127.0.0.1 alone; for "
                    "others start one yourself and name it in engine.urls"
                )
            if means:  # without the value
                raise ValueError(
                    "engine.args: no key belongs in a configuration, and a server on 127.0.0.1 needs none"
                )
        return self


class RolloutConfig(Section):
    """How tasks are played."""

    prompts_per_step: Count = 16
    """Tasks a training step."""
    group_size: int = Field(default=4, ge=2, le=64)
    """Rollouts a task, compared pair by pair (n in the paper)."""
    branching: Literal["independent", "fork_at_check", "fork_at_step"] = "independent"
    """Where rollouts of a group begin to differ: at the prompt (the paper), after a plan, or at a step."""
    gate_contrast: bool = False
    """fork_at_check: take the gate both ways and train it with its all-action gradient (docs/gate.md)."""
    max_staleness: int = Field(default=0, ge=0)
    """sglang: updates that rollouts may be old, sampled while earlier steps train; 0: exactly on policy."""
    temperature: Positive = 1.0
    """Sampling temperature; the trainer's log-probs use the same one."""
    max_steps: Count = 6
    """Turns of the policy in one rollout."""
    max_step_tokens: Count = 72
    """Sampled tokens of one turn."""
    max_rollout_tokens: Count = 512
    """Tokens of a whole rollout: prompt, turns and observations."""
    teach_loop: bool = False
    """Write the text that teaches plan, check and act into the system message, for models new to it."""

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


class JudgeConfig(Section):
    """What compares two rollouts."""

    name: Annotated[str, Field(pattern=r"^(rule|llm|[\w.]+:\w+)$")] = "rule"
    """`rule`: the environment's verdicts; `llm`: a model; `module:Class`: your own (docs/judges.md)."""
    mode: Literal["pairwise", "pointwise"] = "pairwise"
    """llm: every pair in both orders (the paper), or a score a rollout (its ablation)."""
    endpoint: str | None = None
    """llm: an OpenAI-compatible server, for example http://localhost:30000/v1; no user or key in it."""
    model: str | None = None
    """llm: the model's name there."""
    api_key_env: str | None = None
    """llm: the environment variable that holds the key; the key itself is never written anywhere."""
    prompt: Literal["v1"] = "v1"
    """llm: version of the judge's prompt (mosaic_fast/judge/prompts)."""
    temperature: NonNegative = 0.0
    """llm: sampling temperature of the judge."""
    max_tokens: Count = 1024
    """llm: longest answer, reasoning included."""
    timeout_s: Positive = 120.0
    """llm: seconds one call may take."""
    retries: int = Field(default=4, ge=0)
    """llm: further tries of a call that failed or answered nonsense; then the run stops."""
    max_concurrent: Count = 16
    """llm: calls under way at once."""
    max_calls: int = Field(default=0, ge=0)
    """llm: calls after which the run stops, counted from its start or resume; 0: no limit."""
    max_total_tokens: int = Field(default=0, ge=0)
    """llm: tokens, as the server counts them, after which the run stops, counted likewise; 0: no limit."""
    cache: str | None = None
    """llm: file of answers, which runs may share; default judge-answers.sqlite in the run folder."""

    @model_validator(mode="after")
    def _llm_has_an_endpoint(self) -> JudgeConfig:
        missing = [key for key in ("endpoint", "model") if self.name == "llm" and getattr(self, key) is None]
        if missing:
            raise ValueError(f"judge.name = 'llm' needs judge.{missing[0]}")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env, re.ASCII):
            raise ValueError(  # without the value: it may well be a key
                "judge.api_key_env is the name of an environment variable, such as JUDGE_API_KEY, not a key"
            )
        if self.endpoint is not None and not is_plain_url(self.endpoint):
            raise ValueError(
                "judge.endpoint must look like http://localhost:30000/v1, with no user or key in it; "
                "the key belongs in the environment variable that judge.api_key_env names"
            )
        return self


class RewardConfig(Section):
    """R = r_align + r_fmt - p_len, normalised within the group."""

    length_target: Positive = 40.0
    """L0: generated tokens a step above which p_len = (L - L0) / L0 is taken off (400 in the paper)."""
    divide_by_std: bool | None = None
    """Divide centred rewards by the group's standard deviation; default: yes, but not for loss dr_grpo."""
    std_epsilon: NonNegative = 0.1
    """Added to the group's standard deviation, so that tiny differences are not blown up."""
    require_signal: bool = False
    """Stop with an error at a step where every group is a tie or the gradient is zero."""


LossName = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "dpo", "dpo_norm", "ipo"]
PAIRWISE_LOSSES = ("dpo", "dpo_norm", "ipo")


@dataclass(frozen=True)
class LossSettings:
    """The settings of a loss in full: its own, where the configuration leaves them open."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalisation: Literal["token", "sequence", "constant"] = "token"
    kl_weight: float = 0.0
    beta: float = 0.1


OWN_SETTINGS: dict[LossName, LossSettings] = {
    "grpo": LossSettings(kl_weight=0.01),
    "dapo": LossSettings(clip_high=0.28),
    "dr_grpo": LossSettings(normalisation="constant"),
    "gspo": LossSettings(clip_low=3e-4, clip_high=4e-4, normalisation="sequence"),
    "cispo": LossSettings(clip_low=1.0, clip_high=4.0),
    "dpo": LossSettings(),
    "dpo_norm": LossSettings(beta=5.0),
    "ipo": LossSettings(),
}


class LossConfig(Section):
    """The policy loss."""

    name: LossName = "grpo"
    """On rewards: grpo, dapo, dr_grpo, gspo, cispo. On judged pairs: dpo, dpo_norm, ipo (docs/method.md)."""
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The ratio is clipped below 1 - clip_low; default 0.2, gspo 0.0003, cispo 1 (never)."""
    clip_high: Positive | None = None
    """The ratio is clipped above 1 + clip_high; default 0.2, dapo 0.28, gspo 0.0004, cispo 4."""
    normalisation: Literal["token", "sequence", "constant"] | None = None
    """What sums over tokens are divided by: token, sequence (default of gspo) or constant (of dr_grpo)."""
    kl_weight: NonNegative | None = None
    """Weight of the k3 estimate of the KL divergence to the reference; default 0.01 for grpo, else 0."""
    entropy_weight: NonNegative = 0.0
    """Weight of the policy's mean entropy, as a bonus."""
    beta: Positive | None = None
    """Pairwise losses: how closely the reference is kept; default 0.1, dpo_norm 5."""

    @property
    def is_pairwise(self) -> bool:
        return self.name in PAIRWISE_LOSSES

    @property
    def needs_reference(self) -> bool:
        return self.is_pairwise or self.settings.kl_weight > 0

    @property
    def settings(self) -> LossSettings:
        """What is configured, and the loss's own where it is not."""
        own = OWN_SETTINGS[self.name]
        chosen = {name: getattr(self, name) for name in asdict(own) if getattr(self, name) is not None}
        return replace(own, **chosen)

    @model_validator(mode="after")
    def _contradictions(self) -> LossConfig:
        unread = ["clip_low", "clip_high", "normalisation", "kl_weight"] if self.is_pairwise else ["beta"]
        for name in unread:
            if getattr(self, name):
                raise ValueError(f"loss.{name} has no meaning for loss.name = {self.name!r}; leave it out")
        return self


class OffPolicyConfig(Section):
    """What to do where the engine's log-probs differ from the trainer's. Default: nothing but `mismatch/`."""

    truncate_at: Positive | None = None
    """Weigh each token by the ratio trainer / engine, at most this (truncated importance sampling)."""
    mask_below: NonNegative | None = None
    """Weigh each token by that ratio, and by 0 where the ratio is below this."""
    mask_above: Positive | None = None
    """Weigh each token by that ratio, and by 0 where the ratio is above this."""

    @property
    def masks(self) -> bool:
        return self.mask_below is not None or self.mask_above is not None

    @property
    def corrects(self) -> bool:
        return self.truncate_at is not None or self.masks

    @model_validator(mode="after")
    def _contradictions(self) -> OffPolicyConfig:
        low, high = self.mask_below, self.mask_above
        if low is not None and high is not None and low >= high:
            raise ValueError(f"off_policy.mask_below ({low}) must be below off_policy.mask_above ({high})")
        return self


class OptimConfig(Section):
    """AdamW."""

    lr: Positive = 5e-4
    """Learning rate at the start."""
    final_lr_frac: Fraction = 0.1
    """The rate falls linearly to this share of lr at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises from 0."""
    beta1: Fraction = 0.9
    """Decay of the gradient's average."""
    beta2: Fraction = 0.95
    """Decay of the squared gradient's average."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    grad_clip: Positive = 1.0
    """Largest norm of the gradient."""
    epochs: Count = 2
    """Optimiser steps on the rollouts of one training step. Above 1 the clipped ratio comes into play."""
    master_weights: bool = True
    """bfloat16 models: update fp32 copies of the weights and round; without, small updates are lost."""


class ForestConfig(Section):
    """How rollouts are packed for the update."""

    tokens_per_microbatch: Count = 8192
    """Tokens forwarded and held at once; a forest above it is cut, or its prefixes are held, exactly."""
    cost_model: str = "default"
    """File of `python -m mosaic_fast.calibrate`: what work costs, to choose how a forest is run."""
    credit: Literal["sum", "mean", "first", "subtree"] = "sum"
    """What an inherited token gets: all its holders' terms, their mean, its sampler's, or its branch's."""


class CheckpointConfig(Section):
    """What is kept on disk."""

    every: Count = 1
    """Training steps between checkpoints; the last step always has one."""
    keep: Count = 3
    """Newest checkpoints kept."""


class TrackersConfig(Section):
    """Where progress is shown, beside metrics.jsonl."""

    console: Literal["auto", "live", "plain", "quiet"] = "auto"
    """live: a table that redraws itself; plain: a line a step; auto: live on a terminal, else plain."""
    log_to: Annotated[tuple[Literal["wandb", "trackio", "tensorboard"], ...], Field(strict=False)] = ()
    """Trackers that get every metric as well: wandb, trackio, tensorboard (extras of the same names)."""
    project: str = "mosaic_fast"
    """wandb, trackio: the project that the run appears in."""


class Config(Section):
    """MOSAIC: post-train a tool-using agent to plan, check, then act or refuse."""

    steps: Count = 60
    """Training steps."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of tasks and sampling. Same seed and configuration on a CPU: same bits."""
    run_dir: str | None = None
    """Run folder; default runs/<time>-<name>."""
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    judge: JudgeConfig = JudgeConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    off_policy: OffPolicyConfig = OffPolicyConfig()
    optim: OptimConfig = OptimConfig()
    forest: ForestConfig = ForestConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    trackers: TrackersConfig = TrackersConfig()

    @model_validator(mode="after")
    def _contradictions(self) -> Config:
        if self.forest.tokens_per_microbatch < self.rollout.max_rollout_tokens:
            raise ValueError(
                f"forest.tokens_per_microbatch ({self.forest.tokens_per_microbatch}) is below "
                f"rollout.max_rollout_tokens ({self.rollout.max_rollout_tokens}): the longest rollout would "
                "not fit a micro-batch; raise the first or lower the second"
            )
        if self.rollout.max_step_tokens > self.rollout.max_rollout_tokens:
            raise ValueError(
                f"rollout.max_step_tokens ({self.rollout.max_step_tokens}) is above "
                f"rollout.max_rollout_tokens ({self.rollout.max_rollout_tokens}); a turn is part of a rollout"
            )
        if self.optim.warmup_steps >= self.steps > 1:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) must be below steps ({self.steps})"
            )
        if self.engine.urls and self.engine.kind != "sglang":
            raise ValueError(f"engine.urls needs engine.kind = 'sglang', not {self.engine.kind!r}")
        for url in self.engine.urls:
            if not is_plain_url(url):
                raise ValueError(
                    "engine.urls: each must look like http://127.0.0.1:30000, with no user or key in it"
                )
        if self.env.eval_every and not self.env.eval_tasks:
            raise ValueError("env.eval_every needs env.eval_tasks above 0")
        if self.loss.is_pairwise and self.forest.credit != "sum":
            raise ValueError(
                f"forest.credit = {self.forest.credit!r} needs a loss on rewards; loss.name = "
                f"{self.loss.name!r} compares whole rollouts, so leave credit at 'sum'"
            )
        if self.loss.is_pairwise and self.off_policy.corrects:
            raise ValueError(
                f"off_policy corrects losses on rewards; loss.name = {self.loss.name!r} takes rollouts from "
                "any policy, so leave it out"
            )
        if self.forest.credit == "subtree" and self.rollout.branching == "independent":
            raise ValueError(
                "forest.credit = 'subtree' compares branches of a fork, and rollout.branching = "
                "'independent' has none: every advantage would be 0; use 'fork_at_check' or 'fork_at_step'"
            )
        if self.rollout.max_staleness:
            self._check_staleness()
        if self.rollout.gate_contrast:
            self._check_gate_contrast()
        if self.env.name == "agent_safetybench" and self.judge.name == "rule":
            raise ValueError(
                "env.name = 'agent_safetybench' has no verdicts, so judge.name = 'rule' finds nothing but "
                "ties; use judge.name = 'llm' or your own"
            )
        if not self.model.lora_rank and (
            self.model.lora_alpha is not None or self.model.lora_targets != ("all-linear",)
        ):
            raise ValueError("model.lora_alpha and model.lora_targets need model.lora_rank above 0")
        return self

    def _check_staleness(self) -> None:
        if self.engine.kind != "sglang" or self.engine.colocated:
            raise ValueError(
                "rollout.max_staleness above 0 samples beside the trainer: it needs engine.kind = 'sglang' "
                "and servers that are not colocated"
            )
        if not self.off_policy.corrects:
            raise ValueError(
                "rollout.max_staleness above 0 trains on rollouts of older weights: set "
                "off_policy.truncate_at, for example 2.0, so that they are weighed accordingly"
            )

    def _check_gate_contrast(self) -> None:
        wanted = {
            "rollout.branching": (self.rollout.branching, "fork_at_check"),
            "forest.credit": (self.forest.credit, "sum"),
            "off_policy.*": ("set" if self.off_policy.corrects else "unset", "unset"),
        }
        for key, (found, needed) in wanted.items():
            if found != needed:
                raise ValueError(f"rollout.gate_contrast needs {key} = {needed!r}, it is {found!r}")
        if self.loss.is_pairwise or self.loss.name in ("gspo", "cispo"):
            raise ValueError(
                "rollout.gate_contrast needs a loss with a clipped ratio a token: grpo, dapo or dr_grpo, not "
                f"loss.name = {self.loss.name!r}"
            )

    def resolved(self) -> Config:
        """Every value that the loss decides written out, as a run folder keeps it."""
        loss, settings = self.loss, asdict(self.loss.settings)
        read = ["beta"] if loss.is_pairwise else ["clip_low", "clip_high", "normalisation", "kl_weight"]
        divide = self.reward.divide_by_std
        return self.model_copy(
            update={
                "loss": loss.model_copy(update={name: settings[name] for name in read}),
                "reward": self.reward.model_copy(
                    update={"divide_by_std": loss.name != "dr_grpo" if divide is None else divide}
                ),
            }
        )
