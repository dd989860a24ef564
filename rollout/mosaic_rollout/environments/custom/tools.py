"""The tools of a user's object: its public methods, as OpenAI tools with a JSON schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from mosaic_rollout.chat.grammar import REFUSAL_TOOL
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign.code import get_member
from mosaic_rollout.foreign.raised import place_of, words, written
from mosaic_rollout.types import ToolSchema

RESERVED = ("reset", "get_reward", "get_verdict")
"""Public methods that are no tools: the loop calls them."""
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Tools:
    """What the policy may call on an object, and how it is told."""

    schemas: tuple[ToolSchema, ...]
    methods: dict[str, Callable[..., object]]

    def method(self, name: str) -> Callable[..., object]:
        """The method of a name. ValueError where no tool has it."""
        if name not in self.methods:
            raise ValueError(f"no tool is named {name!r}")
        return self.methods[name]


def tool_names(kind: type) -> list[str]:
    """Public methods of a class but the reserved ones, as they are defined, inherited ones last."""
    names: dict[str, None] = {}
    for base in kind.__mro__[:-1]:
        for name, value in vars(base).items():
            if not name.startswith("_") and name not in RESERVED and _is_method(value):
                names[name] = None
    return list(names)


def tools_of(instance: object) -> Tools:
    """UserError names the method that cannot be a tool, or whose hints or docstring do not describe it."""
    schemas, methods = [], {}
    for name in tool_names(type(instance)):
        what = f"{type(instance).__qualname__}.{name}"
        method = get_member(instance, name, type(instance).__qualname__)
        if not callable(method):
            continue  # a subclass or the instance has something else under this name
        refuse_generator(method, what)
        _refuse_unnamed(method, what)
        if name == REFUSAL_TOOL:
            raise UserError(f"{what} has the name of the tool with which the policy refuses; rename it")
        try:
            schema = get_json_schema(method)
        except (DocstringParsingException, TypeHintParsingException, TypeError, ValueError) as error:
            raise UserError(
                f"{what} is public and so a tool, but {error} "
                "Give it type hints and a docstring with an Args: section, or a name that begins with _"
            ) from None
        except Exception as error:  # type hints are code of the user's, too
            raise UserError(
                f"{what} is public and so a tool, but cannot be described: {words(error)}"
                f"{written(place_of(method), whole_path=True)}"
            ) from error
        schemas.append(cast(ToolSchema, schema))
        methods[name] = method
    return Tools(tuple(schemas), methods)


def refuse_generator(method: Callable[..., object] | None, what: str) -> None:
    """UserError for a function with a yield: calling it does nothing."""
    inner = inspect.unwrap(method) if method is not None else None
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise UserError(
            f"{what} is a generator{written(place_of(inner), whole_path=True)}; it must return, not yield"
        )


def _refuse_unnamed(method: Callable[..., object], what: str) -> None:
    """UserError for parameters that a call with named arguments cannot reach, or whose names nobody knows."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return  # describing it fails next, and says so
    for parameter in parameters:
        if parameter.kind not in _BY_NAME:
            mark = str(parameter).partition(parameter.name)[0]  # "*", "**" or nothing
            kind = "any number of arguments" if mark else "an argument by its position only"
            raise UserError(
                f"{what} is public and so a tool, but takes {kind} ({mark}{parameter.name}); "
                "a tool's arguments have names: write them out, or give it a name that begins with _"
            )


def _is_method(value: object) -> bool:
    """A function of a class, also behind a decorator of functools that keeps its signature."""
    if inspect.isfunction(value) or isinstance(value, (staticmethod, classmethod)):
        return True
    return callable(value) and not isinstance(value, type) and hasattr(value, "__wrapped__")
