"""`--dry-run`: the estimate as a table, and whether it fits."""

from __future__ import annotations

from rich.table import Table

from mosaic_fast.cli import plain_console
from mosaic_fast.config import Config
from mosaic_fast.config.hub import download_bytes
from mosaic_fast.config.kinds import defaults_in_words
from mosaic_fast.config.presets import preset_in_words
from mosaic_fast.setup.memory.estimate import (
    PHASES,
    SPARE_FRAC,
    Estimate,
    device_memory,
    estimate_memory,
)

GIB = 2**30


def dry_run(config: Config) -> int:
    """Print what a run will take, and start nothing; returns the exit code."""
    estimate = estimate_memory(config)
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=110)  # a file has no width to fold at
    console.print(memory_table(config, estimate))
    told = defaults_in_words(config)
    left = download_bytes(config.model.path)
    download = None if left is None else f"{_gib(left)} GiB are still to be downloaded from the hub"
    for line in [
        *verdict(estimate),
        *_notes(config, estimate),
        *filter(None, (download, told, preset_in_words(config))),
    ]:
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def memory_table(config: Config, estimate: Estimate) -> Table:
    """A row a component, a column a phase in which the run has a peak of its own."""
    phases = [phase for phase in PHASES if _differs(estimate, phase)]
    table = Table(title=_title(config, estimate), title_justify="left", box=None, pad_edge=False)
    table.add_column("GiB", no_wrap=True)
    for phase in phases:
        table.add_column(phase, justify="right")
    table.add_column("")
    counted = [part for part in estimate.components if part.counted]
    for part in counted:
        cells = [_gib(part.bytes) if phase in part.phases else "-" for phase in phases]
        table.add_row(part.name, *cells, part.about, end_section=part is counted[-1])
    table.add_row("total", *(_gib(estimate.total(phase)) for phase in phases), "", style="bold")
    for part in estimate.components:
        if not part.counted:
            cells = [f"+ {_gib(part.bytes)}" if phase in part.phases else "-" for phase in phases]
            table.add_row(part.name, *cells, f"not in the total: {part.about}")
    return table


def verdict(estimate: Estimate) -> list[str]:
    """The peak against the memory of the device, if there is one here."""
    found = device_memory(estimate.device)
    need = f"{_gib(estimate.peak)} GiB at its peak"
    if found is None:
        return [f"{need}; PyTorch finds no GPU here to compare with"]
    name, size = found
    room = size * (1 - SPARE_FRAC)
    if estimate.peak <= room:
        return [f"{need}: fits {name} with {_gib(size)} GiB"]
    short = _gib(estimate.peak - int(room))
    return [
        f"{need}: {short} GiB too much for {name} with {_gib(size)} GiB, of which a tenth should stay free"
    ]


def _notes(config: Config, estimate: Estimate) -> list[str]:
    """Options that take less memory, where the run may not fit; none where it fits."""
    found = device_memory(estimate.device)
    if found is not None and estimate.peak <= found[1] * (1 - SPARE_FRAC):
        return []
    options = []
    if not config.model.activation_checkpointing:
        options.append("model.activation_checkpointing = true")
    if estimate.tokens > config.rollout.max_rollout_tokens:
        options.append(f"forest.tokens_per_microbatch down to {config.rollout.max_rollout_tokens}")
    if not config.model.lora_rank:
        options.append("model.lora_rank = 32")
    if config.engine.kind == "local" and estimate.total("rollouts") == estimate.peak:
        options.append("engine.max_batch and engine.max_cached_tokens lower")
    return [f"takes less: {'; '.join(options)}"] if options else []


def _title(config: Config, estimate: Estimate) -> str:
    billions = f"{estimate.parameters / 1e9:.2f} B parameters, {estimate.trained / 1e9:.2f} B trained"
    if estimate.parameters < 1e8:
        billions = f"{estimate.parameters / 1e6:.2f} M parameters, {estimate.trained / 1e6:.2f} M trained"
    return f"{config.model.path}: {billions}, {config.model.dtype} on {estimate.device}"


def _differs(estimate: Estimate, phase: str) -> bool:
    """Whether some part is there in this phase and not in every other one."""
    return any(phase in part.phases and part.phases != PHASES for part in estimate.components)


def _gib(count: int) -> str:
    return f"{count / GIB:,.2f}" if count < 100 * GIB else f"{count / GIB:,.0f}"
