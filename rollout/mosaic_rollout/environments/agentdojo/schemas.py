"""AgentDojo's tools as OpenAI tool schemas, without the words pydantic adds of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from mosaic_rollout.environments.agentdojo.api import Tool
from mosaic_rollout.types import JsonValue, ToolSchema


def tool_schema(tool: Tool) -> ToolSchema:
    """One tool: its own name, description and parameters."""
    parameters = without_titles(tool.parameters.model_json_schema())
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def without_titles(schema: JsonValue) -> JsonValue:
    """A JSON schema without its `title` annotations, which repeat the argument's name: a tenth of the tokens.

    An argument that is itself named `title` stays.

    >>> without_titles({"title": "A", "properties": {"title": {"title": "Title", "type": "string"}}})
    {'properties': {'title': {'type': 'string'}}}
    """
    if isinstance(schema, Mapping):
        mapping = cast("Mapping[str, JsonValue]", schema)
        kept: dict[str, JsonValue] = {}
        for key, value in mapping.items():
            if key == "title":
                continue
            if key in ("properties", "$defs") and isinstance(value, Mapping):
                named = cast("Mapping[str, JsonValue]", value)
                kept[key] = {name: without_titles(sub) for name, sub in named.items()}
            else:
                kept[key] = without_titles(value)
        return kept
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [without_titles(item) for item in schema]
    return schema
