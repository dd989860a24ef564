"""Arguments of a call against the tool's JSON schema, before the tool sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mosaic_rollout.foreign.verdicts import shown
from mosaic_rollout.plain_json import check_plain
from mosaic_rollout.types import JsonValue, ToolSchema

_COMBINING = ("allOf", "anyOf", "oneOf", "$ref", "patternProperties", "unevaluatedProperties")
"""Keywords by which a schema may know more arguments than its `properties` name."""
_LONGEST = 300


def find_schema(tools: Sequence[ToolSchema], name: str) -> ToolSchema | None:
    """The tool of a name among an episode's."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            return tool
    return None


def wrong_arguments(
    tool: ToolSchema, arguments: Mapping[str, JsonValue], *, types: bool = True
) -> str | None:
    """What is wrong with the arguments of a call, None where they fit the tool's schema.

    Besides what the schema says: an argument that it does not know is refused, unless it allows others; so
    is what is no JSON that everybody can read (`plain_json`). A schema that is none, or that has no end,
    checks nothing: it came with the tool. types: whether a value of another type is wrong.
    """
    try:
        check_plain(arguments)
    except (ValueError, RecursionError) as error:
        return str(error)
    function = tool.get("function")
    parameters = function.get("parameters") if isinstance(function, Mapping) else None
    if not isinstance(parameters, Mapping):
        return None
    try:
        return _first_error(parameters, arguments, types)
    except Exception:  # noqa: BLE001  jsonschema raises many things over a schema that is none
        return None


def _first_error(
    parameters: Mapping[str, JsonValue], arguments: Mapping[str, JsonValue], types: bool
) -> str | None:
    from jsonschema import Draft202012Validator  # 0.2 s, which runs without such tools are spared
    from jsonschema.exceptions import best_match
    from referencing import Registry

    schema = _nullable(parameters)
    if not isinstance(schema, dict):
        return None
    if isinstance(schema.get("properties"), Mapping) and not any(key in schema for key in _COMBINING):
        schema.setdefault("additionalProperties", False)
    validator = Draft202012Validator(schema, registry=Registry())  # type: ignore[call-arg]  # fetches nothing
    errors = (e for e in validator.iter_errors(arguments) if types or e.validator != "type")
    error = best_match(errors)
    if error is None:
        return None
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    if error.validator == "additionalProperties" and not error.absolute_path:
        unknown = sorted(name for name in arguments if name not in known)
        return (
            f"got an unexpected keyword argument {shown(unknown[0])}; it takes {', '.join(known) or 'none'}"
        )
    if error.validator == "required" and not error.absolute_path:
        missing = [str(name) for name in error.validator_value if name not in arguments]
        return f"missing a required argument: {missing[0]!r}"
    path = "".join(f"[{part!r}]" for part in list(error.absolute_path)[1:])
    name = str(error.absolute_path[0]) if error.absolute_path else ""
    return _bounded(f"argument {name!r}{path}: {error.message}" if name else error.message)


def _nullable(schema: object) -> object:
    """A copy of a schema with OpenAPI's `nullable` in JSON schema's words."""
    if isinstance(schema, Mapping):
        plain = {str(key): _nullable(value) for key, value in schema.items()}
        if plain.get("nullable") is True:  # an argument of that name is a schema, not True
            del plain["nullable"]
            return {"anyOf": [plain, {"type": "null"}]}
        return plain
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [_nullable(item) for item in schema]
    return schema


def _bounded(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
