"""Values as the Java or JavaScript source text that BFCL's checker reads back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

from mosaic_rollout.types import JsonValue


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
