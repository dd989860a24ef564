"""Files of data sets that a user brings: read, and named where they do not fit.

Tool outputs as texts a policy can be shown.

The benchmark packages that environments stand on: installed by name, in the one version that is known.

What a user's `module:Class` names.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.code import get_method
from mosaic_rollout.foreign.raised import place, words, written


def read_json_file(path: Path) -> object:
    """What a JSON file holds, after a byte order mark or none. UserError where it cannot be read as such."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def read_json_list(path: Path, what: str) -> list[object]:
    """The entries of a JSON file that is one list. UserError says `what` it must be where it is none."""
    found = read_json_file(path)
    if not isinstance(found, list) or not found:
        raise UserError(f"{path} holds no list of cases; it must be {what}")
    return found


def text_at(entry: Mapping[str, object], key: str, where: str) -> str:
    """A text that an entry must have. UserError says where it is missing or empty."""
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f'{where}: there is no "{key}"')
    return value


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def as_text(result: object) -> str:
    """What a tool returned: a text as it is, anything else as JSON where it can be, else by its str()."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)


def bounded(text: str, limit_chars: int) -> str:
    """The text, cut after `limit_chars`, saying so.

    >>> bounded("abcdef", 4)
    'abcd\\n[2 more characters are not shown]'
    """
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenised
    if len(text) <= limit_chars:
        return text
    return f"{text[:limit_chars]}\n[{len(text) - limit_chars} more characters are not shown]"


class EnvironmentMissing(UserError):
    """A benchmark's package is not installed, or not in the version its adapter was written for."""


def require_package(name: str, known_version: str, install_hint: str) -> None:
    """Raise EnvironmentMissing unless the package is installed in exactly `known_version`.

    install_hint: what the user runs to have it, in the imperative.
    """
    try:
        installed = version(name)
    except PackageNotFoundError:
        raise EnvironmentMissing(f"the package {name} is not installed; {install_hint}") from None
    if installed != known_version:
        raise EnvironmentMissing(
            f"{name} {installed} is installed, but its insides are used and only {known_version} is known to "
            f"fit; {install_hint}"
        )


def import_named(spec: str, key: str) -> Callable[..., object]:
    """The class or function that spec `module:Class` names; the working directory is searched first.

    UserError with the configuration's key where there is no such module or nothing callable by that name.
    """
    module_name, _, class_name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    _refuse_clash(spec, key, module_name, Path(here))
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's module may raise anything while it is imported, or exit
        where = written(place(error), whole_path=True)
        raise UserError(f"{key} {spec!r}: cannot import {module_name!r} ({words(error)}){where}") from error
    named = get_method(module, class_name, f"{key} {spec!r}: {module_name}")
    if named is None:
        public = [name for name, value in vars(module).items() if inspect.isclass(value)]
        there = f"; there are {', '.join(public)}" if public else ""
        raise UserError(f"{key} {spec!r}: {module_name} has no class {class_name!r}{there}")
    return named


def call_named(spec: str, key: str, named: Callable[..., object]) -> object:
    """What `named()` gives; what it raises becomes a UserError with the configuration's key."""
    name = str(getattr(named, "__name__", spec))
    return ForeignCode(f"{key} {spec!r}").demand(f"{key} {spec!r}: {name}()", named)


def _refuse_clash(spec: str, key: str, module_name: str, here: Path) -> None:
    """UserError for a file of the user's that Python's own module of the same name would be taken for."""
    top = module_name.partition(".")[0]
    file = next((p for p in (here / f"{top}.py", here / top / "__init__.py") if p.is_file()), None)
    if top in sys.stdlib_module_names and file is not None:
        raise UserError(f"{key} {spec!r}: {file} has the name of a module of Python itself; rename it")
