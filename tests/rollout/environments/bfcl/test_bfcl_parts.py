"""The parts of the BFCL adapter that need no installed benchmark."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mosaic_rollout.environments.bfcl.api import Case, Record
from mosaic_rollout.environments.bfcl.environment import call_text, readable_source, refuse_endless
from mosaic_rollout.environments.bfcl.schemas import json_schema, tool_schema
from mosaic_rollout.types import JsonValue, ToolCall

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"[a-z]{3,6}_[a-z]", fullmatch=True), JSON, max_size=3))
def test_a_call_text_is_the_call_and_holds_nothing_that_runs(arguments: dict[str, JsonValue]) -> None:
    """Read back as Python it is one call of literals; no other name before a bracket, also inside strings."""
    text = call_text(ToolCall("tool", arguments))
    assert text.count("(") == 1
    node = ast.parse(text, mode="eval").body
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    assert node.args == []
    read = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    assert repr(read) == repr(arguments)


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("os.system", {}),
        ToolCall("ls() or rm", {}),
        ToolCall("import", {}),
        ToolCall("ls", {"a b": 1}),
        ToolCall("ls", {"a=1, b": 1}),
        ToolCall("ls", {"a": float("nan")}),
        ToolCall("ls", {"a": [{"b": float("inf")}]}),
    ],
)
def test_what_is_no_plain_call_has_no_text(call: ToolCall) -> None:
    with pytest.raises(ValueError, match="is not a"):
        call_text(call)


def test_endless_calls_are_refused_and_ordinary_ones_are_not() -> None:
    for arguments in (
        {"precision": 10**9},
        {"precision": -1},
        {"base": 10, "exponent": 10**9},
        {"decimal_places": -(10**9)},
    ):
        with pytest.raises(ValueError, match=r"precision|digits|decimal_places"):
            refuse_endless(ToolCall("maths", dict(arguments)))
    for arguments in ({"precision": 50}, {"base": 2, "exponent": 10}, {"base": 2.5, "exponent": 10**9}, {}):
        refuse_endless(ToolCall("maths", dict(arguments)))


def test_schemas_get_the_standard_type_names() -> None:
    """An argument that is itself named `type` or `default` keeps its entry."""
    schema: JsonValue = {
        "type": "dict",
        "properties": {
            "type": {"type": "float", "default": "Any"},
            "default": {"type": "tuple", "items": {"type": "Bigint"}},
        },
        "required": ["type"],
    }
    assert json_schema(schema) == {
        "type": "object",
        "properties": {
            "type": {"type": "number", "default": "Any"},
            "default": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["type"],
    }


def test_java_arguments_are_source_text_and_names_have_no_dots() -> None:
    function: Record = {
        "name": "Buffer.put",
        "description": "Puts.",
        "parameters": {
            "type": "dict",
            "properties": {"items": {"type": "ArrayList", "items": {"type": "long"}, "description": "What."}},
            "required": ["items"],
        },
    }
    schema = tool_schema(function, "java")["function"]
    assert isinstance(schema, dict)
    assert schema["name"] == "Buffer_put"
    assert schema["parameters"] == {
        "type": "object",
        "properties": {
            "items": {
                "type": "string",
                "description": 'What. (java source text of type ArrayList of {"type": "long"})',
            }
        },
        "required": ["items"],
    }


def test_variants_of_a_scenario_share_their_leak_key() -> None:
    def case(category: str, number: int, text: str) -> Case:
        question: JsonValue = [[{"role": "user", "content": text}]]
        return Case(category, {"id": f"{category}_{number}", "question": question}, [])

    assert case("multi_turn_base", 7, "a").leak_key == case("multi_turn_miss_func", 7, "b").leak_key
    assert case("multi_turn_base", 7, "a").leak_key != case("multi_turn_base", 8, "a").leak_key
    assert case("simple_python", 1, "Add 1, 2!").leak_key == case("parallel", 9, "add 1 2").leak_key


@pytest.mark.parametrize(
    ("value", "readable"),
    [
        ("[[1, 2], [3]]", True),
        (["a", {"b": "new int[]{1}"}, 7, None], True),
        ("[" + "[1]," * 30 + "x", False),  # minutes in BFCL's own checker
        ({"a": ["new HashMap<>() {{" + "\n" * 200]}, False),
        ("x" * 1000, False),
    ],
)
def test_source_text_that_would_not_end_is_not_read(value: JsonValue, readable: bool) -> None:
    assert readable_source(value) is readable
