"""Values as the Java or JavaScript source text that BFCL's checker reads back.

BFCL's function documents as OpenAI tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

from mosaic_rollout.environments.bfcl.api import Record
from mosaic_rollout.environments.guarded import function_tool
from mosaic_rollout.types import JsonValue, ToolSchema


def argument_text(language: str, document: Mapping[str, JsonValue], value: JsonValue) -> JsonValue:
    """An argument as the checker wants it: in Python the value, in the other languages its source text.

    document: the argument's entry in BFCL's function document, with `type` and, for lists, `items`.

    >>> argument_text("java", {"type": "long"}, 7)
    '7L'
    """
    if language == "python" or (isinstance(value, str) and document["type"] in ("String", "any", "char")):
        return value
    return _java(document, value) if language == "java" else _javascript(document, value)


def _java(document: Mapping[str, JsonValue], value: JsonValue) -> str:
    kind = document["type"]
    if kind == "long":
        return f"{value}L"
    if kind == "float":
        return f"{value}f"
    if kind == "ArrayList" and isinstance(value, list):
        return f"new ArrayList<>(Arrays.asList({_elements(document, value)}))"
    if kind == "Array" and isinstance(value, list):
        return f"new Object[]{{{_elements(document, value)}}}"
    if kind == "HashMap" and isinstance(value, Mapping):
        puts = " ".join(f"put({json.dumps(key)}, {json.dumps(item)});" for key, item in value.items())
        return f"new HashMap<>() {{{{ {puts} }}}}"
    return value if isinstance(value, str) else json.dumps(value)


def _elements(document: Mapping[str, JsonValue], values: Sequence[JsonValue]) -> str:
    kind = cast("Mapping[str, JsonValue]", document["items"])
    return ", ".join(json.dumps(value) if isinstance(value, str) else _java(kind, value) for value in values)


def _javascript(document: Mapping[str, JsonValue], value: JsonValue) -> str:
    if document["type"] == "Bigint":
        return f"{value}n"
    return value if isinstance(value, str) else json.dumps(value)


_TYPES = {
    "dict": "object",
    "hashmap": "object",
    "hashtable": "object",
    "float": "number",
    "double": "number",
    "tuple": "array",
    "list": "array",
    "arraylist": "array",
    "queue": "array",
    "stack": "array",
    "set": "array",
    "any": "string",
    "char": "string",
    "bool": "boolean",
    "byte": "integer",
    "short": "integer",
    "long": "integer",
    "bigint": "integer",
}
"""BFCL's type names, in lower case, where JSON schema has another."""


def tool_name(function: str) -> str:
    """OpenAI's tools have no dots in their names; BFCL writes "_" for them, too."""
    return function.replace(".", "_")


def tool_schema(function: Record, language: str = "python") -> ToolSchema:
    """One function. In Java and JavaScript every argument is a text in the language's own syntax."""
    parameters = json_schema(cast(JsonValue, function["parameters"]))
    if language != "python":
        parameters = _in_source_text(cast(Record, function["parameters"]), language)
    return function_tool(tool_name(str(function["name"])), str(function["description"]), parameters)


def json_schema(schema: JsonValue) -> JsonValue:
    """A schema with JSON schema's type names.

    >>> json_schema({"type": "dict", "properties": {"type": {"type": "float"}}})
    {'type': 'object', 'properties': {'type': {'type': 'number'}}}
    """
    if isinstance(schema, Mapping):
        return {key: _member(key, value) for key, value in cast("Mapping[str, JsonValue]", schema).items()}
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [json_schema(item) for item in schema]
    return schema


def _member(key: str, value: JsonValue) -> JsonValue:
    if key == "type" and isinstance(value, str):
        return _TYPES.get(value.lower(), value.lower())
    if key == "properties" and isinstance(value, Mapping):  # of arguments, one of which may be named "type"
        named = cast("Mapping[str, JsonValue]", value)
        return {name: json_schema(argument) for name, argument in named.items()}
    if key in ("default", "enum", "example"):
        return value
    return json_schema(value)


def _in_source_text(parameters: Record, language: str) -> JsonValue:
    properties: dict[str, JsonValue] = {}
    for name, argument in cast("Mapping[str, Record]", parameters["properties"]).items():
        inner = f" of {json.dumps(argument['items'])}" if "items" in argument else ""
        note = f"{language} source text of type {argument['type']}{inner}"
        properties[name] = {"type": "string", "description": f"{argument.get('description', '')} ({note})"}
    required = parameters.get("required", [])
    return {"type": "object", "properties": properties, "required": required}
