"""The command line of an evaluation, checked before anything is loaded. No torch."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mosaic_fast.cli import options
from mosaic_fast.errors import UserError
from mosaic_rollout.endpoint.parameters import read_change

JUDGE_OPTIONS = (
    "endpoint",
    "model",
    "api_key_env",
    "max_tokens",
    "parameters",
    "timeout_s",
    "retries",
    "max_concurrent",
    "max_calls",
    "max_total_tokens",
)
"""Keys of [judge] that the command line may give, as --judge-KEY."""


@dataclass(frozen=True)
class Arguments:
    """Play tasks with a policy or an endpoint and report rates with 95% confidence intervals."""

    targets: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Model folder, run folder (its newest checkpoint), `embedded`, or the http(s) URL of an
    OpenAI-compatible endpoint, up to /v1. Several are shown side by side."""
    suite: str | None = None
    """Comma-separated names of `env.name`; `NAME=FILE` gives a suite its env.tasks. Default: the config's."""
    config: str | None = None
    """TOML file with [env] and [rollout] for a model folder or an endpoint; a run folder has its own."""
    split: Literal["heldout", "train"] = "heldout"
    """Which tasks."""
    tasks: int = 300
    """How many of each suite; a suite with fewer gives all it has."""
    samples: int = 1
    """Episodes a task."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    seed: int = 0
    """Seed of the draws; the tasks stay the same."""
    attack: str | None = None
    """`best-of-N`: on each injected task up to N attacks, until one succeeds (docs/evaluation.md)."""
    attacks: str | None = None
    """Your attacks: a template a line with {goal} in it, or .jsonl with a JSON string a line. Default: the
    environment's own of that split."""
    attack_endpoint: str | None = None
    """OpenAI-compatible server whose model writes the attacks; it is shown what failed before."""
    attack_model: str | None = None
    """The model's name there."""
    attack_api_key_env: str | None = None
    """Environment variable that holds its key."""
    out: str | None = None
    """Folder that keeps every finished episode; the same command goes on where it stopped."""
    json: str | None = None
    """Write the figures to this file."""
    judge_endpoint: str | None = None
    """OpenAI-compatible server whose model grades agentharm and privacylens; default: judge.endpoint."""
    judge_model: str | None = None
    """The model's name there; this and the options below default to the config's [judge]."""
    judge_api_key_env: str | None = None
    """Environment variable that holds the judge's key."""
    judge_max_tokens: int | None = None
    """Longest answer of the judge, reasoning included."""
    judge_parameters: tuple[str, ...] | None = None
    """NAME=OTHER renames a parameter of the judge's requests, NAME= leaves it out (docs/judges.md)."""
    judge_timeout_s: float | None = None
    """Seconds a call to the judge may take."""
    judge_retries: int | None = None
    """Further tries of a call that failed or answered nonsense; then the evaluation stops."""
    judge_max_concurrent: int | None = None
    """Calls to the judge under way at once."""
    judge_max_calls: int | None = None
    """Calls after which the evaluation stops; 0: no limit."""
    judge_max_total_tokens: int | None = None
    """Tokens of the judge after which the evaluation stops; 0: no limit."""
    max_steps: int | None = None
    """Turns an episode; default: the config's, or 16 where there is none and the suite is not `world`."""
    max_step_tokens: int | None = None
    """Sampled tokens a turn; default: the config's, or 1024."""
    max_rollout_tokens: int | None = None
    """Tokens of a whole episode; default: the config's, or 16384."""
    teach_loop: bool | None = None
    """Teach plan, check and act in the system message; default: the config's, or True."""
    date: str | None = None
    """The date, as 2026-07-01, for chat templates that ask for it; default: the config's, or today."""
    model_name: str | None = None
    """Endpoint: name of the model there."""
    api_key_env: str | None = None
    """Endpoint: environment variable that holds the key; default: OPENAI_API_KEY, if it is set."""
    parameters: tuple[str, ...] = ()
    """Endpoint: NAME=OTHER renames a request's max_tokens, temperature or seed, NAME= leaves it out."""
    protocol: Literal["loop", "native"] = "loop"
    """Endpoint: the model writes plan, check and action as text, or makes its own tool calls only."""
    write_tools: bool = False
    """Endpoint: write the tools into the system message, for a server that takes none (loop only)."""
    concurrency: int = 8
    """Endpoint: episodes played at once."""
    timeout_s: float = 120.0
    """Endpoint: seconds a request may take."""
    retries: int = 4
    """Endpoint: how often a failed request is sent again."""
    backoff_s: float = 1.0
    """Endpoint: seconds before the first of these; doubled every time."""


def parse(arguments: list[str] | None = None) -> Arguments:
    """The checked command line. UserError for values that contradict; tyro reports those of another type."""
    return checked(options(Arguments, "python -m mosaic_fast.evaluate", arguments))


def checked(given: Arguments) -> Arguments:
    """The same arguments. UserError for values that are out of range or contradict each other."""
    if not given.targets:
        raise UserError("name what to evaluate: a model folder, a run folder, `embedded` or a URL")
    for name in ("tasks", "samples", "max_steps", "max_step_tokens", "max_rollout_tokens", "concurrency"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} must be at least 1, not {value}")
    for name in ("temperature", "retries", "backoff_s", "seed"):
        if not getattr(given, name) >= 0:
            raise UserError(f"{flag(name)} must be at least 0, not {getattr(given, name)}")
    if not given.timeout_s > 0:
        raise UserError(f"--timeout-s must be above 0, not {given.timeout_s:g}")
    if given.date is not None:
        try:
            datetime.date.fromisoformat(given.date)
        except ValueError:
            raise UserError(f"--date: {given.date!r} is no date; write it as 2026-07-01") from None
    for change in given.parameters:
        try:
            read_change(change)
        except UserError as error:
            raise UserError(f"--parameters: {error}") from None
    if given.samples > 1 and given.temperature == 0:
        raise UserError("--samples above 1 needs a --temperature above 0: greedy samples are all the same")
    endpoints = [target for target in given.targets if is_url(target)]
    if endpoints and not given.model_name:
        raise UserError(f"{endpoints[0]} is an endpoint: --model-name says which of its models")
    _check_attack(given)
    if given.protocol == "native" and given.write_tools:
        raise UserError("--write-tools belongs to --protocol loop; native calls need the server's own tools")
    if len(set(given.targets)) < len(given.targets):
        raise UserError("the same model is named twice")
    return given


def attack_count(given: Arguments) -> int:
    """The N of `--attack best-of-N`. UserError where it is none."""
    found = re.fullmatch(r"best-of-([1-9][0-9]{0,3})", given.attack or "")
    if found is None:
        raise UserError(f"--attack {given.attack!r}: write it as best-of-16, with at most four digits")
    return int(found[1])


def _check_attack(given: Arguments) -> None:
    """UserError for options of attacks that contradict each other."""
    if given.attack is None:
        for name in ("attacks", "attack_endpoint", "attack_model", "attack_api_key_env"):
            if getattr(given, name) is not None:
                raise UserError(f"{flag(name)} needs --attack, for example --attack best-of-16")
        return
    attack_count(given)
    if given.attacks and given.attack_endpoint:
        raise UserError("--attacks and --attack-endpoint both say where attacks come from; leave one out")
    if (given.attack_endpoint is None) != (given.attack_model is None):
        raise UserError("--attack-endpoint and --attack-model belong together")


def flag(name: str) -> str:
    """How an argument is written on the command line."""
    return f"--{name.replace('_', '-')}"


def is_url(target: str) -> bool:
    return target.startswith(("http://", "https://"))
