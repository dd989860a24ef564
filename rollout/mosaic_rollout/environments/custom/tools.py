"""The tools of a user's object: its public methods, as OpenAI tools with a JSON schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from mosaic_rollout.errors import UserError
from mosaic_rollout.types import JsonValue, ToolSchema

RESERVED = ("reset", "get_reward", "get_verdict")
"""Public methods that are no tools: the loop calls them."""


@dataclass(frozen=True)
class Tools:
    """What the policy may call on an object, and how it is told."""

    schemas: tuple[ToolSchema, ...]
    methods: dict[str, Callable[..., object]]

    def run(self, name: str, arguments: dict[str, JsonValue]) -> object:
        """Call a method. ValueError says which arguments it takes where they do not fit."""
        method = self.methods[name]
        try:
            inspect.signature(method).bind(**arguments)
        except TypeError as error:
            raise ValueError(f"{name}{inspect.signature(method)}: {error}") from None
        return method(**arguments)


def tool_names(kind: type) -> list[str]:
    """Public methods of a class but the reserved ones, as they are defined, inherited ones last."""
    names: dict[str, None] = {}
    for base in kind.__mro__[:-1]:
        for name, value in vars(base).items():
            is_method = inspect.isfunction(value) or isinstance(value, (staticmethod, classmethod))
            if is_method and not name.startswith("_") and name not in RESERVED:
                names[name] = None
    return list(names)


def tools_of(instance: object) -> Tools:
    """UserError names the method whose type hints or docstring do not describe its arguments."""
    schemas, methods = [], {}
    for name in tool_names(type(instance)):
        method = getattr(instance, name)
        try:
            schema = get_json_schema(method)
        except (DocstringParsingException, TypeHintParsingException, TypeError, ValueError) as error:
            raise UserError(
                f"{type(instance).__qualname__}.{name} is public and so a tool, but {error} "
                "Give it type hints and a docstring with an Args: section, or a name that begins with _"
            ) from None
        schemas.append(cast(ToolSchema, schema))
        methods[name] = method
    return Tools(tuple(schemas), methods)
