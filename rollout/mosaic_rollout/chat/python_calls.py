"""Calls written as Python, `[read(path="a.txt")]`: ToolACE's, and Llama 3.2's by its model card.

Only literals are read, by a reader of its own: no text that a model writes reaches Python's parser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mosaic_rollout.chat.written_call import CallFormat, WrittenCall
from mosaic_rollout.plain_json import plain
from mosaic_rollout.types import JsonValue, ToolCall, ToolSchema

_DEEPEST = 64  # values within values
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_NAME = r"""[^\[\](){}=,:"'\n]++"""  # tools' names may hold spaces, as ToolACE's do
_KEY = r"""[^\s\[\](){}=,:"']++"""
_OPENS = re.compile(rf"""\s*+\[\s*+({_NAME})\(\s*+(?=\)|{_KEY}\s*+=|["'{{]|\*\*)""")
_ARGUMENT = re.compile(rf"\s*+({_KEY})\s*+=(?!=)")
_CLOSES = re.compile(r"\s*+\)\s*+\]\s*+\Z")
_MARK = re.compile(r"\s*+([\[\](){},:])")
_STRING = re.compile(
    r'''\s*+(?:"""((?:[^"\\]|\\.|"(?!""))*+)"""|\'\'\'((?:[^'\\]|\\.|'(?!''))*+)\'\'\''''
    r"""|"((?:[^"\\]|\\.)*+)"|'((?:[^'\\]|\\.)*+)')""",
    re.DOTALL,
)
_NUMBER = re.compile(
    r"\s*+([+-]?(?!0[0-9])(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?)(?![\w.])"
)
_WORD = re.compile(r"\s*+([A-Za-z]++)(?!\w)")
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL
)
_ESCAPED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\n": ""}


@dataclass(frozen=True)
class PythonCalls(CallFormat):
    """The whole action is a Python list with one call, all of its arguments named and literal.

    A call whose arguments have no names (`[read("a.txt")]`, `[read(**{...})]`) is none that can be run.
    """

    def at(self, text: str, start: int) -> WrittenCall | None:
        found = self.find(text[start:])
        if not found or not found[0].complete:
            return None
        return WrittenCall(start + found[0].start, start + found[0].end, found[0].body)

    def find(self, text: str) -> list[WrittenCall]:
        if _OPENS.match(text) is None:
            return []
        body = text.strip()
        start = text.index("[")
        return [WrittenCall(start, start + len(body), body, complete=self.parse(body) is not None)]

    def parse(self, body: str, tools: Sequence[ToolSchema] = ()) -> ToolCall | None:
        opened = _OPENS.match(body)
        if opened is None:
            return None
        arguments: dict[str, JsonValue] = {}
        position = opened.end()
        try:
            while (key := _ARGUMENT.match(body, position)) is not None:
                if key[1] in arguments:
                    return None
                value, position = _value(body, key.end(), 0)
                arguments[key[1]] = plain(value)
                mark = _MARK.match(body, position)
                if mark is None or mark[1] != ",":
                    break
                position = mark.end()
        except ValueError:
            return None
        return ToolCall(opened[1].strip(), arguments) if _CLOSES.match(body, position) else None

    def write(self, call: ToolCall) -> str:
        return f"[{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})]"


def read_literal(text: str) -> JsonValue:
    """The value of a Python literal made of strings, numbers, True, False, None, lists, tuples and dicts.

    ValueError where the text is none.

    >>> read_literal("{'a': [1, True]}")
    {'a': [1, True]}
    """
    value, end = _value(text, 0, 0)
    if text[end:].strip():
        raise ValueError("there is more behind it")
    return plain(value)


def _value(text: str, position: int, depth: int) -> tuple[object, int]:
    """The literal that begins at `position`, and where it ends; ValueError where there is none."""
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST}")
    string = _STRING.match(text, position)
    if string is not None:
        parts: list[str] = []
        while string is not None:  # neighbours are one string
            parts.append(_unescaped(next(part for part in string.groups() if part is not None)))
            position = string.end()
            string = _STRING.match(text, position)
        return "".join(parts), position
    number = _NUMBER.match(text, position)
    if number is not None:
        digits = number[1]
        return (int(digits) if digits.lstrip("+-").isdecimal() else float(digits)), number.end()
    word = _WORD.match(text, position)
    if word is not None:
        if word[1] not in _WORDS:
            raise ValueError(f"{word[1]} is no literal")
        return _WORDS[word[1]], word.end()
    mark = _MARK.match(text, position)
    if mark is None or mark[1] not in "[({":
        raise ValueError("no literal")
    if mark[1] == "{":
        return _pairs(text, mark.end(), depth)
    return _items(text, mark.end(), depth, "]" if mark[1] == "[" else ")")


def _items(text: str, position: int, depth: int, closes: str) -> tuple[object, int]:
    items: list[object] = []
    while True:
        mark = _MARK.match(text, position)
        if mark is not None and mark[1] == closes:
            return items, mark.end()
        value, position = _value(text, position, depth + 1)
        items.append(value)
        position, ended = _next(text, position, closes)
        if ended:
            if closes == ")" and len(items) == 1:
                return items[0], position  # brackets around a value
            return items, position


def _pairs(text: str, position: int, depth: int) -> tuple[object, int]:
    pairs: dict[str, object] = {}
    while True:
        mark = _MARK.match(text, position)
        if mark is not None and mark[1] == "}":
            return pairs, mark.end()
        key, position = _value(text, position, depth + 1)
        mark = _MARK.match(text, position)
        if not isinstance(key, str) or key in pairs or mark is None or mark[1] != ":":
            raise ValueError("no pair of a key and a value")
        pairs[key], position = _value(text, mark.end(), depth + 1)
        position, ended = _next(text, position, "}")
        if ended:
            return pairs, position


def _next(text: str, position: int, closes: str) -> tuple[int, bool]:
    """Past the comma or the bracket that follows an item, and whether it was the bracket."""
    mark = _MARK.match(text, position)
    if mark is None or mark[1] not in (",", closes):
        raise ValueError("no comma and no closing bracket")
    return mark.end(), mark[1] == closes


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(_character, text) if "\\" in text else text


def _character(match: re.Match[str]) -> str:
    byte, short, long, octal, other = match.groups()
    if other is not None:
        return _ESCAPED.get(other, other if other in "\\'\"" else f"\\{other}")
    code = int(octal, 8) if octal else int(byte or short or long, 16)
    if code > 0x10FFFF:
        raise ValueError("no character has this number")
    return chr(code)
