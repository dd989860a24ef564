"""Defaults that the kind of model decides: what suits a model of 0.6 M weights suits no other.

| kind | what it is |
|---|---|
| embedded | `model.path = "embedded"`: the defaults in the sections themselves |
| weights | any other folder, every weight trained |
| adapters | any other folder with `model.lora_rank` above 0 |
| trained | a checkpoint of ours: it goes on with what its run had, which lies in its folder |

A cold start (`[sft]`) has a learning rate, a loss and an evaluation of its own, whatever the model.

A value that is given, in a file or on the command line, always wins. `docs/configuration.md` has the table
with reasons.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from mosaic_fast.config.hub import cached_folder
from mosaic_fast.config.presets import PRESET_KEYS, PRESETS

if TYPE_CHECKING:
    from mosaic_fast.config.config import Config

Value = bool | int | float | str
RECORD = "mosaic_fast.json"
"""File in a checkpoint's folder: the settings of its run that the kind of a model decides."""

OTHER_MODELS: Mapping[str, Value] = {
    "rollout.max_steps": 10,
    "rollout.max_step_tokens": 1024,
    "rollout.max_rollout_tokens": 8192,  # and no more than the model has positions
    "rollout.teach_loop": True,
    "reward.length_target": 400.0,
    "optim.lr": 1e-6,
    "optim.epochs": 1,
    "forest.tokens_per_microbatch": 8192,  # and no fewer than a rollout may have
}
"""Key -> default for a model that is neither the embedded one nor trained by us."""
ADAPTERS: Mapping[str, Value] = {"optim.lr": 1e-5}
"""What differs for adapters."""
SUPERVISED: Mapping[str, Value] = {"optim.lr": 1e-5, "optim.epochs": 1, "loss.name": "sft"}
"""What differs for a cold start."""
SUPERVISED_ADAPTERS: Mapping[str, Value] = {"optim.lr": 1e-4}
KEYS = tuple(OTHER_MODELS)
LEFT_OPEN = tuple({*KEYS, *PRESET_KEYS, "loss.name", "env.eval_tasks"})
"""Keys whose default follows from others: a value that nobody gave is none."""
_CHECKPOINT = re.compile(r"step-\d{6,}", re.ASCII)
_OF_TRAINING = ("optim.lr", "optim.epochs")
"""Keys that another way of training (adapters or every weight, supervised or not) does not take over."""


@dataclass(frozen=True)
class Kind:
    """The kind of a model: its name in words, and its defaults by key."""

    words: str
    defaults: Mapping[str, Value]


def kind_of(path: str, *, adapters: bool, supervised: bool = False) -> Kind | None:
    """The kind of the model in a folder; None for the embedded one, which the sections' own defaults suit.

    ValueError for a record in the folder that is none.
    """
    folder = cached_folder(path) or Path(path)
    if path == "embedded" or _same(folder, Path(str(files("mosaic_fast.setup").joinpath("embedded")))):
        return None
    defaults = {**OTHER_MODELS, **(ADAPTERS if adapters else {})}
    if supervised:
        defaults |= {**SUPERVISED, **(SUPERVISED_ADAPTERS if adapters else {})}
    words = "adapters of another model" if adapters else "every weight of another model"
    record = _record(folder / RECORD)
    if record is not None:
        before = bool(record.get("adapters")), bool(record.get("supervised"))
        same_way = before == (adapters, supervised)
        taken = [key for key in KEYS if key in record and (same_way or key not in _OF_TRAINING)]
        defaults |= {key: record[key] for key in taken}
        words = "a model that was trained here"
    positions = _positions(folder)
    if positions is not None:
        longest = defaults["rollout.max_rollout_tokens"]
        defaults["rollout.max_rollout_tokens"] = min(longest, positions)
    return Kind(words, defaults)


def with_defaults_of_kind(values: object) -> object:
    """The values of a configuration, not yet validated, with what they leave open to the kind of model.

    A default gives way to what is given: a turn may be no longer than a rollout, and a rollout no longer than
    a micro-batch.
    """
    if not isinstance(values, Mapping):
        return values
    path, rank = _given(values, "model.path") or "embedded", _given(values, "model.lora_rank")
    if not isinstance(path, str) or "\0" in path:
        return values
    if (newest := newest_checkpoint(path)) is not None:
        path, values = newest, {**values, "model": _with(values.get("model"), "path", newest)}
    supervised = bool(_given(values, "sft.conversations") or _given(values, "sft.demonstrations"))
    named = values.get("preset")
    preset = PRESETS[named].values if isinstance(named, str) and named in PRESETS else {}
    rank = preset.get("model.lora_rank") if rank is None else rank
    kind = kind_of(path, adapters=isinstance(rank, int) and rank > 0, supervised=supervised)
    if kind is None and preset:
        raise ValueError("preset is for a model of your own in model.path; the embedded one needs none")
    defaults: dict[str, Value] = {}
    if kind is not None:
        positions = kind.defaults["rollout.max_rollout_tokens"]
        kind = Kind(kind.words, {**kind.defaults, **preset})
        defaults = _within_limits(values, kind, positions)
    elif supervised:  # the embedded model's rate suits it either way
        defaults = {key: value for key, value in SUPERVISED.items() if key != "optim.lr"}
    own_data = supervised and not _given(values, "sft.demonstrations")
    if own_data and kind is not None and _given(values, "env.name") in (None, "world"):
        defaults["env.eval_tasks"] = 0  # the default environment is the embedded model's
    filled = dict(values)
    for key, default in defaults.items():
        if _given(values, key) is None:
            section, _, name = key.partition(".")
            filled[section] = _with(filled.get(section), name, default)
    return filled


def newest_checkpoint(path: str) -> str | None:
    """The newest checkpoint of the run in a folder, which stands for it; None where it is no run's folder."""
    try:
        found = [one.name for one in Path(path, "checkpoints").iterdir() if _CHECKPOINT.fullmatch(one.name)]
    except (OSError, ValueError):
        return None
    newest = max(found, key=lambda name: int(name.removeprefix("step-")), default=None)
    return None if newest is None else str(Path(path, "checkpoints", newest))


def _within_limits(values: Mapping[object, object], kind: Kind, longest_of_kind: Any) -> dict[str, Value]:
    """The defaults of a kind and preset, those of limits within the limits that are given.

    longest_of_kind: tokens that a rollout of this kind of model may have, whatever the preset.
    """
    defaults: dict[str, Any] = dict(kind.defaults)
    defaults["rollout.max_rollout_tokens"] = min(defaults["rollout.max_rollout_tokens"], longest_of_kind)
    batch = _count(_given(values, "forest.tokens_per_microbatch"))
    if batch is not None:
        defaults["rollout.max_rollout_tokens"] = min(defaults["rollout.max_rollout_tokens"], batch)
    longest = _count(_given(values, "rollout.max_rollout_tokens")) or defaults["rollout.max_rollout_tokens"]
    defaults["rollout.max_step_tokens"] = min(defaults["rollout.max_step_tokens"], longest)
    if defaults["forest.tokens_per_microbatch"]:  # 0 leaves it to the memory there is
        defaults["forest.tokens_per_microbatch"] = max(defaults["forest.tokens_per_microbatch"], longest)
    return defaults


def defaults_in_words(config: Config) -> str | None:
    """One line on the values that the kind of model decided; None where it is the embedded one."""
    adapters, supervised = config.model.lora_rank > 0, config.sft.is_set
    kind = kind_of(config.model.path, adapters=adapters, supervised=supervised)
    if kind is None:
        return None
    chosen = {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in KEYS}
    told = ", ".join(f"{key} {_written(value)}" for key, value in chosen.items())
    return f"{kind.words} (docs/configuration.md, Kinds of model): {told}"


def record_of(config: Config) -> str:
    """What a checkpoint of a run keeps for those who train or evaluate it again, as the text of RECORD."""
    values = {key: getattr(getattr(config, key.partition(".")[0]), key.partition(".")[2]) for key in KEYS}
    way = {"adapters": config.model.lora_rank > 0, "supervised": config.sft.is_set}
    return json.dumps({**way, **values}, indent=1) + "\n"


def _record(path: Path) -> dict[str, Value] | None:
    """The record in a folder; None where there is none. ValueError for another file of that name."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model.path: {path} cannot be read: {error}; remove it, or set the keys") from None
    wanted = {"adapters": False, **OTHER_MODELS}
    if not isinstance(found, dict) or not all(
        key in found and isinstance(found[key], type(default)) for key, default in wanted.items()
    ):
        raise ValueError(f"model.path: {path} is no record of a run; remove it, and set {', '.join(KEYS)}")
    return found


def _positions(folder: Path) -> int | None:
    """The positions of a model, as its config.json states them."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever loads the model says what is wrong with the folder
    return _count(found.get("max_position_embeddings")) if isinstance(found, dict) else None


def _given(values: Mapping[object, object], key: str) -> object:
    """What is given for a key, whether its section is a table or made already; None where nothing is."""
    section, _, name = key.partition(".")
    inside = values.get(section)
    if isinstance(inside, BaseModel):
        return getattr(inside, name, None) if name in inside.model_fields_set else None
    return inside.get(name) if isinstance(inside, Mapping) else None


def _with(section: object, name: str, value: Value) -> object:
    if isinstance(section, BaseModel):
        return section.model_copy(update={name: value})
    if section is None:
        return {name: value}
    return {**section, name: value} if isinstance(section, Mapping) else section


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31 else None


def _written(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def _same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError):
        return False
