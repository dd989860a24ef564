"""`python -m mosaic_fast.serve MODEL`: a policy behind OpenAI's chat-completions protocol."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mosaic_fast.cli import options, run_cli
from mosaic_fast.config import Config, ModelConfig
from mosaic_fast.errors import UserError

if TYPE_CHECKING:
    from mosaic_fast.setup.build import Setup

_CONTEXT_TOKENS = 16_384
_KEPT_TOKENS = 2**22
"""Of conversations whose tokens are remembered; the oldest are rendered from their text again."""


@dataclass(frozen=True)
class Arguments:
    """Serve a policy to clients of OpenAI's chat completions: tools, streams, log-probs, several choices."""

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, run folder (its newest checkpoint) or `embedded`. A run's engine is used, SGLang too."""
    config: str | None = None
    """TOML file with [engine], [rollout] and [model] for a model folder; a run folder has its own."""
    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach needs --api-key-env."""
    port: int = 8000
    """Port to listen on; 0: one that is free."""
    api_key_env: str | None = None
    """Environment variable that holds the key which clients must send."""
    model_name: str | None = None
    """What the model is called in requests; default: the folder's name."""
    teach_loop: bool | None = None
    """Teach plan, check and act in the system message; default: the config's."""
    refusal_tool: bool = True
    """Show the model refusal_tool beside the client's tools; a call of it is OpenAI's `refusal`."""
    max_tokens: int | None = None
    """Longest answer where a request names no limit; default: the config's rollout.max_step_tokens."""
    context_tokens: int | None = None
    """Tokens of a whole conversation; default: the config's rollout.max_rollout_tokens, or 16384."""
    date: str | None = None
    """The date, as 2026-07-01, for chat templates that ask for it; default: today."""


def parse(arguments: list[str] | None = None) -> Arguments:
    """The checked command line. UserError for values that are out of range."""
    given = options(Arguments, "python -m mosaic_fast.serve", arguments)
    if not 0 <= given.port < 2**16:
        raise UserError(f"--port must be between 0 and 65535, not {given.port}")
    for name in ("max_tokens", "context_tokens"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not given.api_key_env and not _is_loopback(given.host):
        raise UserError(
            f"--host {given.host} can be reached from outside: --api-key-env names the environment variable "
            "that holds the key which clients must send"
        )
    _key(given)
    return given


def main() -> int:
    given = parse()
    try:
        from mosaic_rollout.serving.app import Access, bound, chat_app, running
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'mosaic-fast[serve]'") from None
    from mosaic_rollout.serving.history import History
    from mosaic_rollout.serving.service import Service, Session

    config, folder = _config(given)
    listening = bound(given.host, given.port)  # before a model is loaded
    setup = _setup(config, folder)
    chat, limits = setup.loop.chat, setup.loop.limits
    name = given.model_name or Path(given.model).resolve().name
    tokens = given.max_tokens or limits.max_step_tokens
    service = Service(setup.engine, chat, name, limits.max_rollout_tokens, tokens)
    session = Session(History(chat, offers_refusal=given.refusal_tool, keep_tokens=_KEPT_TOKENS))
    key = _key(given)
    access = Access(by_key={key: session}) if key else Access(open=session)
    app = chat_app(service, access, lambda line: print(line, file=sys.stderr, flush=True))

    async def serve() -> None:
        async with running(app, listening) as url:
            print(f"{name} is served at {url}", flush=True)
            await asyncio.Event().wait()

    try:
        with closing(setup.engine):
            setup.run(serve(), version=0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    return 0


def _config(given: Arguments) -> tuple[Config, Path]:
    """What the policy is loaded and sampled by, and its folder."""
    from mosaic_fast.evaluate.targets import model_and_config

    found, folder = model_and_config(given.model, given.config)
    config = found or Config(model=ModelConfig(path=given.model))
    known = given.model == "embedded" or found is not None
    context = given.context_tokens or (config.rollout.max_rollout_tokens if known else _CONTEXT_TOKENS)
    rollout = config.rollout.model_copy(
        update={
            "max_rollout_tokens": context,
            "date": given.date or config.rollout.date or datetime.date.today().isoformat(),
            "teach_loop": config.rollout.teach_loop if given.teach_loop is None else given.teach_loop,
        }
    )
    return config.model_copy(update={"rollout": rollout}), folder


def _setup(config: Config, folder: Path) -> Setup:
    from mosaic_fast.setup.build import build_setup
    from mosaic_rollout.environments.world import WorldEnvironment

    return build_setup(config, folder, environment=WorldEnvironment())  # which is not played


def _key(given: Arguments) -> str | None:
    """The key that clients must send. UserError where a variable is named that holds none."""
    if not given.api_key_env:
        return None
    key = os.environ.get(given.api_key_env, "").strip()
    if not key:
        raise UserError(f"--api-key-env: the environment variable {given.api_key_env} is not set, or empty")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
