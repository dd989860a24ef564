"""BFCL's own solutions as calls: of multi-turn cases a text each, of single-turn ones acceptable values."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from mosaic_rollout.environments.bfcl.api import Case
from mosaic_rollout.environments.bfcl.schemas import argument_text, tool_name
from mosaic_rollout.types import JsonValue, ToolCall

UNSOLVED = {"multi_turn_miss_func": 1, "simple_java": 10, "live_simple": 2, "live_multiple": 2}
"""Category -> cases whose own ground truth BFCL's checker fails: a state that the solution does not reach,
Java lists of texts whose quotes are not taken off, arguments for which no value is acceptable."""


def acceptable_calls(case: Case) -> list[ToolCall]:
    """A single-turn case's calls, each argument with the first acceptable value; "" marks one left out.

    A relevance case, which accepts any call, gets one; an irrelevance case none.
    """
    functions = {str(f["name"]): f for f in cast("Sequence[Mapping[str, JsonValue]]", case.entry["function"])}
    if case.category == "live_relevance":
        return [ToolCall(tool_name(next(iter(functions))), {})]
    calls = []
    for name, arguments in _pairs(case.ground_truth):
        document = cast("Mapping[str, JsonValue]", functions[name]["parameters"])
        properties = cast("Mapping[str, Mapping[str, JsonValue]]", document["properties"])
        chosen: dict[str, JsonValue] = {}
        for key, values in arguments.items():
            if "" in values and key not in cast("Sequence[str]", document.get("required", [])):
                continue
            value = _plain(next((value for value in values if value != ""), ""))
            chosen[key] = argument_text(case.language, properties.get(key, {}), value)
        calls.append(ToolCall(tool_name(name), chosen))
    return calls


def _pairs(truth: Sequence[JsonValue]) -> list[tuple[str, Mapping[str, Sequence[JsonValue]]]]:
    calls = cast("Sequence[Mapping[str, Mapping[str, Sequence[JsonValue]]]]", truth)
    return [pair for call in calls for pair in call.items()]


def _plain(value: JsonValue) -> JsonValue:
    """An acceptable value; in a dict, also in one of a list, every value is a list of acceptable ones."""
    if isinstance(value, Mapping):
        inner = cast("Mapping[str, Sequence[JsonValue]]", value)
        return {key: options[0] for key, options in inner.items() if options and "" not in options}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def parsed_call(text: str, parameters: Callable[[str], Sequence[str]]) -> ToolCall:
    """A ground truth's call text as a call: positional arguments get their names, `parameters` of a tool."""
    node = ast.parse(text, mode="eval").body
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"not a plain call: {text}")
    name = node.func.id
    arguments = dict(zip(parameters(name), map(ast.literal_eval, node.args), strict=False))
    arguments |= {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return ToolCall(name, arguments)
