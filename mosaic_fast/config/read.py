"""Configuration in and out: TOML file, command line, and the check of a resumed run. No torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tomli_w
import tyro
from pydantic import BaseModel, ValidationError

from mosaic_fast.config import Config
from mosaic_fast.config.hub import Kind, hub_name, pinned
from mosaic_fast.config.kinds import LEFT_OPEN
from mosaic_fast.config.nearest import nearest_key
from mosaic_fast.config.resume import flatten, keep_schedule, refuse_differences
from mosaic_fast.errors import UserError
from mosaic_fast.run.durable import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_COMMAND_LINE = "the command line"
_ON_HUB: Mapping[str, Kind] = {"model.path": "model", "env.tasks": "dataset", "env.heldout_tasks": "dataset"}
"""Keys that take a name on the hub, and what kind of repository it is."""
_LONGEST_SHOWN = 300  # characters of a value in a message


class _TrainArguments(Config):
    """Train. The first argument may be a TOML file; options override it."""

    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in --run-dir from its last complete checkpoint."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print how much memory the run will take, from the model's config.json alone, and start nothing."""


@dataclass(frozen=True)
class TrainCommand:
    """What a command line asks for."""

    config: Config
    resume: bool
    name: str  # of the run
    dry_run: bool


def load_config(path: Path, *, model: str | None = None, is_folder: bool = True, pin: bool = False) -> Config:
    """The configuration a TOML file describes. UserError where it is missing, broken or invalid.

    model: what stands for model.path, so that what the file leaves open suits that model. A folder takes the
        place of the file's own; what is no folder (`is_folder` False) is the model that the file names.
    pin: names on the hub are looked up, for a run that starts.
    """
    values = _read_toml(path)
    inside = values.get("model")
    if not is_folder and isinstance(inside, dict) and "path" in inside:
        model = None
    values = _for_model(values, model)
    return _validate(_on_hub(values, _run_dir(values, ())) if pin else values, f"{path}")


def revised(config: Config, changes: Mapping[str, Mapping[str, object]]) -> Config:
    """The configuration with other values, `{section: {key: value}}`; None unsets. UserError if invalid."""
    return _validate(_merge(config.model_dump(exclude_none=True), changes), "the configuration")


def save_config(config: Config, path: Path) -> None:
    """Write every value, defaults included."""
    write_text(path, tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def parse_train_arguments(arguments: Sequence[str]) -> tuple[Config, bool, str]:
    """(configuration, resume, name of the run) of a command line that is to train."""
    command = parse_train_command(arguments)
    return command.config, command.resume, command.name


def parse_train_command(arguments: Sequence[str], module: str = "mosaic_fast.train") -> TrainCommand:
    """What a command line `[run.toml] [--options]` asks for; module: the command's, for its --help.

    The file is validated by itself, so that a bad value in it is refused even where an option replaces it;
    but for the model that an option names, since the kind of model decides what the file leaves open.
    With --resume the run folder's own config.toml is the base; of what differs from it, what
    `resume.ACCEPTED` names takes effect, and all else is refused.
    """
    rest, values, name = list(arguments), {}, "world"
    source = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    if source is not None:
        values, name = _read_toml(source), source.stem
    run_dir = _run_dir(values, rest)
    rest = _options_on_hub(rest, run_dir)
    values = _on_hub(values, run_dir, given=_named(rest))
    if source is not None:
        _validate(_for_model(values, _model_of(rest)), str(source))
    base = _validate(_for_model(values, _model_of(rest)), "the configuration")
    parsed = _parse_options(base, rest, module, given=values)
    if not parsed.resume:
        return TrainCommand(_config_of(parsed), False, name, parsed.dry_run)
    if parsed.run_dir is None:
        raise UserError("--resume needs --run-dir: the folder of the run to go on with")
    folder = Path(parsed.run_dir)
    if not folder.is_dir():
        raise UserError(f"--resume: there is no folder {folder}; leave --resume out to start a run there")
    stored_path = folder / "config.toml"
    if not stored_path.is_file():
        return TrainCommand(_config_of(parsed), True, name, parsed.dry_run)
    stored = load_config(stored_path).resolved()
    merged = _validate(_merge(stored.model_dump(exclude_none=True), values), "the configuration")
    asked = _config_of(_parse_options(merged, rest, module, given=merged.model_dump()))
    refuse_differences(stored, asked)
    return TrainCommand(keep_schedule(stored, asked, asked.steps), True, name, parsed.dry_run)


def _parse_options(
    base: Config, arguments: Sequence[str], module: str, *, given: Mapping[str, object]
) -> _TrainArguments:
    """`base` with the command line's options over it, validated as a file is.

    given: the values that `base` was made of, nested; what neither they nor the command line give is left to
        the kind of model, which an option may have changed.

    tyro reads the types, and reports a value that is of another one; it exits then, and for --help.
    """
    parsed, unknown = tyro.cli(
        _options(_TrainArguments, base),
        args=list(arguments),
        prog=f"python -m {module} [run.toml]",
        return_unknown_args=True,
    )
    try:
        values = _without(asdict(parsed), set(LEFT_OPEN) - flatten(given).keys() - _named(arguments))
        return _TrainArguments.model_validate(_merge(values, _unknown_keys(unknown)))
    except ValidationError as error:
        raise UserError(_explain(error, _COMMAND_LINE)) from None


def _options(model: type[BaseModel], base: BaseModel) -> type[DataclassInstance]:
    """The fields of a model as a dataclass with the defaults of `base`: their types, without their limits."""
    fields: list[tuple[str, object, object]] = []
    for name, info in model.model_fields.items():
        kind, default = info.annotation, getattr(base, name, info.default)
        if isinstance(default, BaseModel):
            kind = _options(type(default), default)
            default = kind()
        text = tyro.conf.arg(help=info.description or kind.__doc__)  # without one, tyro reads source files
        marked = Annotated[(kind, *info.metadata, text)]  # pyrefly: ignore [not-a-type]  # made at run time
        fields.append((name, marked, _field(default)))
    return make_dataclass(model.__name__, fields, namespace={"__doc__": model.__doc__}, frozen=True)


def _field(default: object) -> object:
    """A field of a dataclass, which wants a dict to be made anew."""
    return field(default_factory=default.copy) if isinstance(default, dict) else field(default=default)


def _for_model(values: Mapping[str, object], path: str | None) -> dict[str, object]:
    """The values of a file for another model than the file's own, if one is given."""
    if path is None or not isinstance(values.get("model", {}), Mapping):
        return dict(values)
    return _merge(values, {"model": {"path": path}})


def _model_of(arguments: Sequence[str]) -> str | None:
    """The folder that --model.path names, the last one of several."""
    return _option(arguments, "--model.path")


def _option(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option, the last one of several."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option:
            found = value if equals else following or None
    return found


def pinned_config(config: Config) -> Config:
    """The configuration with names on the hub pinned, as a command line's are. UserError for unknown ones."""
    asked = {"model": {"path": config.model.path}, "env": config.env.model_dump(exclude_none=True)}
    found = _on_hub(asked, config.run_dir)
    return config if found == asked else _validate(_merge(config.model_dump(), found), "the configuration")


def _run_dir(values: Mapping[str, object], arguments: Sequence[str]) -> str | None:
    """The run folder that options or a file name."""
    found = _option(arguments, "--run-dir") or values.get("run_dir")
    return found if isinstance(found, str) else None


def _on_hub(
    values: Mapping[str, object], run_dir: str | None, *, given: Set[str] = frozenset()
) -> dict[str, object]:
    """The values of a file with names on the hub pinned, but for keys that options give.

    A run that is there already keeps the commits that it began with.
    """
    changed: dict[str, object] = dict(values)
    for key in set(_ON_HUB) - given:
        section, _, name = key.partition(".")
        inside = values.get(section)
        text = inside.get(name) if isinstance(inside, Mapping) else None
        if isinstance(text, str):
            changed = _merge(changed, {section: {name: _pin(text, key, run_dir)}})
    return changed


def _options_on_hub(arguments: Sequence[str], run_dir: str | None) -> list[str]:
    """Options with names on the hub pinned; of several with one key the last, which is the one that holds."""
    changed, seen = list(arguments), set[str]()
    for place in reversed(range(len(arguments))):
        option, equals, value = arguments[place].partition("=")
        key = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or key not in _ON_HUB or key in seen:
            continue
        seen.add(key)
        if equals:
            changed[place] = f"{option}={_pin(value, key, run_dir)}"
        elif place + 1 < len(arguments):
            changed[place + 1] = _pin(arguments[place + 1], key, run_dir)
    return changed


def _pin(text: str, key: str, run_dir: str | None) -> str:
    """A name on the hub with the commit that the run in `run_dir` has, else the one that it has now."""
    asked = hub_name(text)
    if asked is None:
        return text
    stored = Path(run_dir, "config.toml") if run_dir else None
    if stored is not None and stored.is_file() and not asked.is_pinned:
        section, _, name = key.partition(".")
        inside = _read_toml(stored).get(section)
        kept = inside.get(name) if isinstance(inside, Mapping) else None
        had = hub_name(kept) if isinstance(kept, str) else None
        if had is not None and (had.repo, had.file) == (asked.repo, asked.file):
            return str(had)
    return pinned(text, key, _ON_HUB[key])


def _named(arguments: Sequence[str]) -> set[str]:
    """The keys that options name: `optim.lr` for --optim.lr 1e-5, and for --optim.lr=1e-5."""
    names = [a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")]
    return {name.replace(".no_", ".") for name in names} | set(names)


def _without(values: Mapping[str, object], keys: set[str], prefix: str = "") -> dict[str, object]:
    """Nested values without some keys."""
    return {
        name: _without(value, keys, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in values.items()
        if prefix + name not in keys
    }


def _unknown_keys(arguments: Sequence[str]) -> dict[str, object]:
    """Options that no key has, as nested values, so that they are refused as unknown keys of a file are."""
    values: dict[str, object] = {}
    for argument in arguments:
        if argument.startswith("--"):
            *sections, key = argument[2:].partition("=")[0].replace("-", "_").split(".")
            below: dict[str, object] = {key: argument}
            for section in reversed(sections):
                below = {section: below}
            values = _merge(values, below)
    if arguments and not values:
        raise UserError(f"the command line has {arguments[0]!r}, which belongs to no option; see --help")
    return values


def _config_of(parsed: _TrainArguments) -> Config:
    return Config(**{name: getattr(parsed, name) for name in Config.model_fields}).resolved()


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read: its values are nested too deep") from None


def _validate(values: Mapping[str, object], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, source)) from None


def _explain(error: ValidationError, source: str) -> str:
    """One line a mistake: the key, what is wrong with it, and for an unknown key those that exist."""
    lines = []
    for item in error.errors():
        location = tuple(str(part) for part in item["loc"])
        key = ".".join(location)
        if item["type"] == "extra_forbidden":
            below = item["input"]
            inner = tuple(map(str, below)) if isinstance(below, Mapping) and len(below) == 1 else ()
            lines.append(f"  {key}: no such key; {_meant(location + inner, source)}")
        elif key and item["type"] != "value_error":  # a section's own message names its keys
            lines.append(f"  {key} = {_shown(item['input'])}: {item['msg']}")
        else:
            lines.append(f"  {item['msg'].removeprefix('Value error, ')}")
    return f"{source} is not a valid configuration:\n" + "\n".join(lines)


def _meant(location: tuple[str, ...], source: str) -> str:
    """The key that may be meant, else all that there are in its section."""
    sections = _known_keys(())
    keys = [f"{section}.{key}" for section in sections for key in _known_keys((section,))]
    flags = [name for name in _TrainArguments.model_fields if name not in sections]
    on_command_line = source == _COMMAND_LINE
    close = nearest_key(".".join(location), [*keys, *sections, *(flags if on_command_line else ())])
    if close is None:
        section = location[:-1] if location[0] in sections else ()
        return f"there are {', '.join(_known_keys(section))}"
    option = f" (--{close.replace('_', '-')})" if on_command_line and not _known_keys((close,)) else ""
    return f"did you mean {close}{option}?"


def _shown(value: object) -> str:
    """A value in a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, values nested deep
        return "a value too long to show"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _known_keys(section: tuple[str, ...]) -> list[str]:
    """The keys of a section; none where there is no such section."""
    model: type[BaseModel] = Config
    for name in section:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _merge(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = (
            _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return merged
