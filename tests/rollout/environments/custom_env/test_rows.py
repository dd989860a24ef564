"""Files of tasks: what a JSON text may hold arrives as it is, what nobody could read alike is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosaic_rollout.environments.custom.rows import read_rows
from mosaic_rollout.errors import UserError
from mosaic_rollout.plain_json import json_lines
from mosaic_rollout.types import JsonValue, ToolCall
from tests.rollout.environments.custom_env.guests import Quiet, environment_of

TEXTS = st.text(
    st.sampled_from('a \u2028\u2029\x85\x0b\x0c\x1c\x1e\r\n\t"\\é漢😀\ufeff\x00')
    | st.characters(exclude_categories=["Cs"]),
    max_size=12,
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(TEXTS.filter(bool), st.dictionaries(st.sampled_from("abc"), JSON)), min_size=1, max_size=3
    ),
    st.booleans(),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["\n", "\n\n", "\r\n"]),
)
def test_rows_are_read_as_they_were_written(
    tmp_path: Path, rows: list[tuple[str, dict[str, JsonValue]]], escaped: bool, mark: str, end: str
):
    lines = [json.dumps({"prompt": prompt, **columns}, ensure_ascii=escaped) for prompt, columns in rows]
    file = tmp_path / "tasks.jsonl"
    file.write_bytes((mark + end.join(lines)).encode())
    found = read_rows(file)
    assert [(row.messages[0]["content"], row.columns) for row in found] == rows


def test_a_line_ends_at_a_line_feed_only():
    assert list(json_lines("\ufeff1\u20282\x0c3\n \n4")) == [(1, "1\u20282\x0c3"), (3, "4")]


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"n": 1}}}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": "", "tool_calls": [CALL]}, ""),
        ({"content": None, "tool_calls": [CALL]}, ""),
        ({"tool_calls": [CALL]}, ""),
        ({"content": [{"type": "text", "text": "I "}, {"type": "text", "text": "add"}]}, "I add"),
        ({"content": []}, ""),
        ({"content": None}, 'line 1, message 2: "content" must be a text'),
        ({}, '"content" must be a text'),
        ({"content": 3}, '"content" must be a text or a list of text parts, it is 3'),
        ({"content": [IMAGE]}, "a part of \"content\" is of type 'image_url'"),
        ({"content": ["text"]}, "a part of \"content\" is of type 'text'"),
        ({"content": "x", "tool_calls": [{"name": "add"}]}, '"tool_calls" must be a list of'),
    ],
)
def test_the_forms_of_a_message(tmp_path: Path, message: dict[str, object], content: str):
    prompt = [
        {"role": "user", "content": "add"},
        {"role": "assistant", **message},
        {"role": "user", "content": "go"},
    ]
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({"prompt": prompt}))
    if 'content"' in content or "tool_calls" in content:
        with pytest.raises(UserError, match=re.escape(content)):
            read_rows(file)
    else:
        assert read_rows(file)[0].messages[1] == {"role": "assistant", **message, "content": content}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "n": NaN}', "line 2: not JSON (NaN is not JSON)"),
        ('{"prompt": "a", "n": -Infinity}', "line 2: not JSON (-Infinity is not JSON)"),
        ('{"prompt": "a", "n": 1e999}', "line 2: not JSON (a number is too large)"),
        ('{"prompt": "a", "n": 123456789012345678901}', "line 2: not JSON (a number is too large)"),
        (f'{{"prompt": "a", "n": {"9" * 5000}}}', "line 2: not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "line 2: not JSON (the key 'prompt' occurs twice)"),
        ('{"prompt": "a", "x": {"y": 1, "y": 2}}', "line 2: not JSON (the key 'y' occurs twice)"),
        ('{"prompt": "a", "x": ' + "[" * 100_000, "line 2: not JSON"),
        ('{"prompt": ["a"]}', "line 2, message 1: a message is an object"),
        (
            '{"prompt": [{"role": "bot", "content": "a"}]}',
            "line 2, message 1: \"role\" is 'bot'; a conversation has",
        ),
        ('{"prompt": {"role": "user"}}', 'line 2: "prompt" must be a text'),
        ('{"prompt": "a", "kind": ["benign"]}', "line 2: \"kind\" is ['benign']"),
    ],
)
def test_what_nobody_could_read_alike_is_refused(tmp_path: Path, line: str, said: str):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(UserError) as error:
        read_rows(file)
    assert said in str(error.value)


class Disk(Quiet):
    """Keeps its columns, as TRL's examples do, and changes them."""

    def reset(self, files: dict[str, list[str]], **row: object) -> str:  # type: ignore[override]
        self.files = files
        return f"{sorted(files)} {files['log']}"

    def delete(self, name: str) -> str:
        """Delete a file.

        Args:
            name: Which.
        """
        self.files["log"].append(name)
        return str(self.files.pop(name))


def test_every_rollout_starts_from_the_row_as_it_is_in_the_file(tmp_path: Path):
    row = {"prompt": "tidy up", "files": {"log": ["a"], "old": ["b"]}}
    environment = environment_of(tmp_path, Disk, [row, {**row, "prompt": "x"}])
    (task,) = environment.sample("train", 1, 0)
    before = copy.deepcopy(task)
    opened = []
    for _ in range(3):
        episode = environment.reset(task)
        opened.append(copy.deepcopy(episode.messages))
        assert episode.step(ToolCall("delete", {"name": "old"})).content == "['b']"
        assert isinstance(episode.messages[-1], dict)
        episode.messages[-1]["content"] = "changed"
    assert opened[0] == opened[1] == opened[2]
    assert task == before
