"""Checkpoints: a Hugging Face folder and what training needs to go on, bit for bit.

A checkpoint is written under a name that starts with `.tmp-`, forced to disk and renamed: what bears its
name is complete. A manifest of SHA-256 sums tells a damaged one from a sound one.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from mosaic_fast.distributed import ALONE, World
from mosaic_fast.errors import TrainingError, UserError
from mosaic_fast.learner.optimizer import Optimizer
from mosaic_fast.learner.tensor_file import Entry, reading, write_tensors
from mosaic_fast.run.durable import sync

_STATE, _PROGRESS, _MANIFEST = "trainer/state.safetensors", "progress.json", "manifest.json"
_VERSIONS = "versions.json"
"""The state has a folder of its own: servers of models load every safetensors file beside config.json."""
_NAME = re.compile(r"step-(\d{6,})", re.ASCII)
_RNG = "torch_rng"
_UPDATES = "updates"
_PACKAGES = ("mosaic-fast", "torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "sglang")
"""What computes a run: a checkpoint names the versions."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Tasks and draws are functions of (seed, step), attacks of `attacks` as well."""

    step: int = 0  # training steps done
    train_s: float = 0.0  # seconds spent in them
    before: dict[str, list[float]] = field(default_factory=dict)  # metric -> [hits, total] before training
    unevaluated: dict[str, float] = field(default_factory=dict)  # metrics of `step`, its evaluation to come
    attacks: dict[str, object] = field(default_factory=dict)  # what a bandit over attacks knows


def checkpoint_path(folder: Path, progress: Progress) -> Path:
    """The folder of the checkpoint of `progress.step` in the folder of all checkpoints."""
    return folder / f"step-{progress.step:06d}"


def step_of(checkpoint: Path) -> int:
    """How many training steps a checkpoint's weights have had, by the folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    folder: Path,
    save_weights: Callable[[Path | None], None],
    tokenizer: PreTrainedTokenizerBase,
    optimizer: Optimizer,
    progress: Progress,
    keep: int,
    world: World = ALONE,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write `folder`/step-NNNNNN and keep the newest `keep`. TrainingError where the disk refuses.

    Of several ranks the first one writes, and all of them hand over their parts.
    save_weights: write the model to a folder; without one, only hand over. check: raises UserError where
    what was written cannot be used; so may save_weights. Such a folder is never called a checkpoint.
    """
    final = checkpoint_path(folder, progress)
    if not world.is_first:
        save_weights(None)
        write_tensors(None, _state(optimizer))
        return final
    unfinished = folder / f".tmp-{final.name}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_weights(unfinished)
        tokenizer.save_pretrained(str(unfinished))
        (unfinished / _STATE).parent.mkdir()
        write_tensors(unfinished / _STATE, _state(optimizer))
        (unfinished / _VERSIONS).write_text(json.dumps(versions(), indent=1) + "\n", encoding="utf-8")
        if check is not None:
            check(unfinished)
            _check_state(unfinished / _STATE, optimizer)
        done = asdict(progress) | {_UPDATES: optimizer.updates}
        (unfinished / _PROGRESS).write_text(json.dumps(done), encoding="utf-8")
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        sums = {path.relative_to(unfinished).as_posix(): _sha256(path) for path in files}
        (unfinished / _MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for path in [*unfinished.rglob("*"), unfinished]:
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        sync(folder)
    except UserError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise TrainingError(
            f"the checkpoint of step {progress.step} cannot be loaded again, so it is not kept: {error}"
        ) from None
    except (OSError, RuntimeError, SafetensorError) as error:  # each library reports a full disk its own way
        shutil.rmtree(unfinished, ignore_errors=True)
        last = latest_checkpoint(folder)
        raise TrainingError(
            f"the checkpoint of step {progress.step} cannot be written to {folder}: {error}. "
            + (f"{last.name} is intact" if last else "There is no earlier one")
            + "; make room and go on with --resume"
        ) from None
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def verify_checkpoint(checkpoint: Path) -> None:
    """TrainingError that names the first file of a checkpoint that is missing or changed."""
    try:
        sums = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        damaged = [name for name, value in sums.items() if _sha256(checkpoint / name) != value]
        damaged += [f"{_MANIFEST} (it leaves out {name})" for name in (_PROGRESS, _STATE) if name not in sums]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        damaged, sums = [f"{_MANIFEST} ({error})"], {}
    if damaged:
        others = [path.name for path in _complete(checkpoint.parent) if path != checkpoint]
        advice = f"move that folder away to resume from {others[-1]}" if others else "there is no other one"
        raise TrainingError(f"checkpoint {checkpoint} is corrupt: {', '.join(damaged)}; {advice}")


def checkpoint_to_load(folder: Path, world: World) -> Path | None:
    """The newest checkpoint in `folder`, once the first rank has seen that it is sound; None without one.

    UserError on a rank that does not see it: the folder is not on storage that all ranks share.
    """
    checkpoint = latest_checkpoint(folder) if world.is_first else None
    if checkpoint is not None:
        verify_checkpoint(checkpoint)
    name = world.from_first(None if checkpoint is None else checkpoint.name)
    if name is None:
        return None
    checkpoint = folder / str(name)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint} is not there on every node; run_dir must be on storage that all share")
    return checkpoint


def load_training_state(checkpoint: Path, optimizer: Optimizer) -> Progress:
    """Put the optimiser and the random number generator back; the weights are the model folder's.

    However many ranks wrote the checkpoint: the state is whole, and each rank reads its own rows of it.
    """
    done = json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))
    if _UPDATES not in done:
        raise TrainingError(f"{checkpoint} was written by an earlier version, which cannot be resumed from")
    updates = int(done.pop(_UPDATES))
    with reading(checkpoint / _STATE) as read:
        optimizer.load(read, updates)
        torch.set_rng_state(read(_RNG))
    return Progress(**done)


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Name -> version, of Python and of every package among these that is installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def made_with(checkpoint: Path) -> dict[str, str]:
    """The versions that a checkpoint names; those of an earlier version of this program name none."""
    try:
        found = json.loads((checkpoint / _VERSIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def other_versions(checkpoint: Path) -> str | None:
    """A note for the user where a checkpoint was made with other versions than those of now; else None."""
    before, now = made_with(checkpoint), versions()
    changed = [
        f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if not changed:
        return None
    return f"the checkpoint was made with other versions, so that bits may differ: {', '.join(changed)}"


def _check_state(path: Path, optimizer: Optimizer) -> None:
    """TrainingError where the optimiser's file does not hold exactly the tensors that it should."""
    with reading(path) as read:
        found = read.names
    expected = {*optimizer.entry_names(), _RNG}
    if found != expected:
        raise TrainingError(f"{path.name} lacks or adds {min(found ^ expected)}")


def _state(optimizer: Optimizer) -> list[Entry]:
    rng = torch.get_rng_state()
    return [*optimizer.entries(), Entry(_RNG, tuple(rng.shape), rng.dtype, lambda: rng)]


def _complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the oldest first: nothing else that lies there counts."""
    if not folder.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(name[1]), path) for name, path in named if name)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
