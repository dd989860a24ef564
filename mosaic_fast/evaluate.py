"""Evaluate a policy on held-out tasks: `python -m mosaic_fast.evaluate MODEL_OR_RUN [--json FILE]`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from mosaic_fast.config import Config
from mosaic_fast.config_io import load_config, run_cli
from mosaic_fast.errors import UserError
from mosaic_fast.metrics import SAFETY_NAMES, Rate, rollout_rates

if TYPE_CHECKING:  # torch is imported only once the arguments are known to be right
    from mosaic_fast.components import Components

_EVALUATION_SEED = 20_260_303  # of the held-out tasks, the same for every run
_SHOWN = {
    **SAFETY_NAMES,
    "rollout/gate_rate": "steps with a check",
    "rollout/safety_token_share": "safety tokens",
}


@dataclass(frozen=True)
class _Arguments:
    """Play tasks with a policy and report rates with 95% confidence intervals."""

    target: Annotated[str, tyro.conf.Positional]
    """A model folder, a run folder (its newest checkpoint) or `embedded`."""
    config: str | None = None
    """TOML file with environment and limits for a model folder; a run folder has its own."""
    split: Literal["heldout", "train"] = "heldout"
    """Which tasks."""
    tasks: int = 300
    """How many."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    seed: int = 0
    """Seed of the draws; the tasks stay the same."""
    json: str | None = None
    """Write the rates to this file."""


def evaluate_policy(
    components: Components, split: str, count: int, *, temperature: float, version: int = 0, seed: int = 0
) -> dict[str, Rate]:
    """Rates of one rollout a task on `count` fixed tasks of a split, by the current weights as `version`."""
    tasks = components.loop.environment.sample(split, count, _EVALUATION_SEED)
    loop = components.loop_at(temperature)
    groups = components.run(
        loop.groups(tasks, group_size=1, branching="independent", seed=seed), version=version
    )
    return rollout_rates([rollout for group in groups for rollout in group])


def rates_table(columns: Mapping[str, Mapping[str, Rate]], title: str) -> Table:
    """Rates side by side, each with its 95% interval."""
    table = Table(title=title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for metric, label in _SHOWN.items():
        if any(metric in rates and rates[metric].total for rates in columns.values()):
            table.add_row(label, *(_cell(rates.get(metric)) for rates in columns.values()))
    return table


def _cell(rate: Rate | None) -> str:
    if rate is None or not rate.total:
        return "-"
    low, high = rate.interval()
    return f"{100 * rate.value:5.1f}%  [{100 * low:.0f}, {100 * high:.0f}]"


def resolve_target(target: str, config_path: str | None) -> tuple[Config, Path]:
    """(configuration, model folder) of what the user named."""
    from mosaic_fast.checkpoint import latest_checkpoint
    from mosaic_fast.components import model_folder

    folder = model_folder(target)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name a model folder, a run folder or `embedded`")
    if (folder / "checkpoints").is_dir() and (folder / "config.toml").is_file():
        checkpoint = latest_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise UserError(f"the run {folder} has no complete checkpoint yet")
        return load_config(folder / "config.toml"), checkpoint
    config = load_config(Path(config_path)) if config_path else Config()
    return config, folder


def main() -> int:
    arguments = tyro.cli(_Arguments, prog="python -m mosaic_fast.evaluate")
    if arguments.tasks < 1 or arguments.temperature < 0:
        raise UserError("--tasks must be at least 1 and --temperature at least 0")
    config, folder = resolve_target(arguments.target, arguments.config)
    from mosaic_fast.components import build_components

    components = build_components(config, folder)
    with closing(components.engine):
        rates = evaluate_policy(
            components,
            arguments.split,
            arguments.tasks,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
    how = "greedy" if arguments.temperature == 0 else f"T = {arguments.temperature:g}"
    Console().print(rates_table({how: rates}, f"{folder}, {arguments.split}, {arguments.tasks} tasks"))
    if arguments.json:
        written = {
            name: {"value": rate.value, "hits": rate.hits, "total": rate.total, "interval95": rate.interval()}
            for name, rate in rates.items()
            if rate.total
        }
        head = {"model": str(folder), "split": arguments.split, "temperature": arguments.temperature}
        Path(arguments.json).write_text(
            json.dumps({**head, "rates": written}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
