"""What the user named, resolved: a model in a folder or an endpoint, its configuration, and the suites."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mosaic_fast.config import EVALUATION_ONLY, Config, EnvConfig, JudgeConfig, ModelConfig, RolloutConfig
from mosaic_fast.config.hub import data_path, pinned
from mosaic_fast.config.kinds import RECORD
from mosaic_fast.config.read import load_config
from mosaic_fast.config.section import PLAIN_URL, is_plain_url
from mosaic_fast.errors import UserError
from mosaic_fast.evaluate.arguments import Arguments, is_url
from mosaic_fast.evaluate.judging import judge_config

_STOCK = {"max_steps": 16, "max_step_tokens": 1024, "max_rollout_tokens": 16_384, "teach_loop": True}
"""Limits for models and suites that no configuration speaks of."""
LIMITS = tuple(_STOCK)
_KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Suite:
    """A suite and the limits that its episodes have."""

    env: EnvConfig
    rollout: RolloutConfig


@dataclass(frozen=True)
class Target:
    """A model to evaluate. `folder` is None for an endpoint."""

    name: str  # as the user wrote it
    config: Config  # with the suite that allows the longest episodes
    suites: tuple[Suite, ...]
    folder: Path | None
    identity: dict[str, object]  # which model it is, wherever it lies
    judge: JudgeConfig | None  # of the suites that need one


def resolve(name: str, arguments: Arguments, given: Config | None = None) -> Target:
    """The target a user named. UserError for what is missing or contradicts itself.

    given: the configuration of what is no run, in place of the file that --config names.
    """
    if is_url(name):
        _check_url(name)
        api_key(arguments)  # a missing one is named before anything is loaded
        config, folder = _given_config(arguments.config, name), None
        identity: dict[str, object] = {"endpoint": name.rstrip("/"), "model_name": arguments.model_name}
    else:
        name = pinned(name, "the model", "model")
        config, folder = model_and_config(name, arguments.config)
        config = config or given
        identity = {"weights_sha256": weight_hashes(folder)}
    base = config or Config(model=ModelConfig(path=name))
    known = folder is not None and (name == "embedded" or (folder / RECORD).is_file())
    wanted = {key: getattr(arguments, key) for key in _STOCK}
    chosen = {key: value for key, value in wanted.items() if value is not None}
    suites = []
    for env in _suites(base, arguments.suite):
        stock = dict(_STOCK) if config is None and not (known and env.name == "world") else {}
        if known and name != "embedded":
            stock.pop("teach_loop", None)  # as it was trained
        values = {**base.rollout.model_dump(), **stock, **chosen}
        suites.append(Suite(env, RolloutConfig.model_validate(values)))
    longest = max(suites, key=lambda suite: suite.rollout.max_rollout_tokens)
    update = {"env": longest.env, "rollout": longest.rollout}
    judged = any(suite.env.name in EVALUATION_ONLY for suite in suites)
    judge = judge_config(base, arguments) if judged else None
    return Target(name, base.model_copy(update=update), tuple(suites), folder, identity, judge)


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file of a model folder, as `sha256sum` prints it."""
    paths = sorted(p for suffix in ("safetensors", "bin") for p in folder.glob(f"*model*.{suffix}"))
    if not paths:
        raise UserError(f"{folder} holds no weights (model.safetensors); name a model folder or a run folder")
    return {path.name: file_hash(path) for path in paths}


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file. UserError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def data_hash(path: str | Path, *, is_folder: bool = False) -> str:
    """SHA-256 of a suite's data: of a file, or of the names and hashes of a folder's JSON files."""
    folder = data_path(str(path), folder=is_folder)
    if not folder.is_dir():
        return file_hash(folder)
    files = sorted(folder.rglob("*.json"))
    listed = "\n".join(f"{file_hash(file)} {file.relative_to(folder).as_posix()}" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def api_key_variable(arguments: Arguments) -> str:
    """The environment variable of the endpoint's key."""
    return arguments.api_key_env or _KEY_VARIABLE


def api_key(arguments: Arguments) -> str | None:
    """The key of the environment, if there is one. UserError where a variable is named that holds none."""
    key = os.environ.get(api_key_variable(arguments), "").strip()
    if arguments.api_key_env and not key:
        raise UserError(
            f"--api-key-env: the environment variable {arguments.api_key_env} is not set, or empty"
        )
    return key or None


def model_and_config(name: str, config: str | None) -> tuple[Config | None, Path]:
    """The model's configuration, None where nothing names one, and its folder; config: a file for no run."""
    from mosaic_fast.learner.checkpoint import latest_checkpoint
    from mosaic_fast.setup.model_folder import model_folder

    name = pinned(name, "the model", "model")
    folder = model_folder(name)
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; name a model folder, a run folder, `embedded` or a URL with http://"
        )
    if (folder / "checkpoints").is_dir() and (folder / "config.toml").is_file():
        checkpoint = latest_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise UserError(f"the run {folder} has no complete checkpoint yet")
        return load_config(folder / "config.toml"), checkpoint
    return _given_config(config, name), folder


def _given_config(config: str | None, model: str) -> Config | None:
    """The configuration of --config, for the model that is named instead of its own."""
    if not config:
        return None
    return load_config(Path(config), model=model, is_folder=not is_url(model))


def _suites(config: Config, asked: str | None) -> tuple[EnvConfig, ...]:
    """The [env] of every suite: the configuration's own where it has that name, else its defaults."""
    if asked is None:
        return (config.env,)
    suites = []
    for part in asked.split(","):
        name, _, tasks = part.strip().partition("=")
        if not name:
            raise UserError(f"--suite {asked!r}: an empty name; write for example world,agentdojo")
        if name == config.env.name and not tasks:
            suites.append(config.env)
            continue
        try:
            suites.append(EnvConfig(name=name, tasks=tasks or None))
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"--suite {part.strip()}: {reason}; NAME=FILE gives a suite its tasks") from None
    names = [suite.name for suite in suites]
    if len(set(names)) < len(names):
        raise UserError(f"--suite {asked}: a suite is named twice")
    return tuple(suites)


def _check_url(url: str) -> None:
    """UserError for what is no http(s) URL. The message does not repeat it: it may hold a key."""
    if not is_plain_url(url):
        raise UserError(
            f"what is named to evaluate is no URL of an endpoint: {PLAIN_URL}, for example "
            "http://localhost:8000/v1. A key goes into the environment variable that --api-key-env names"
        )
