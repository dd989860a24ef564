"""What a judge said, read: one JSON object of a given shape, whatever stands around it. Never a guess.

A judge may think aloud first, put its answer behind a Markdown fence or between words, write 1 for "1", or
quote tags and JSON of the trajectories in its reason. The thought is passed over, and of what is left every
JSON object is looked at as a whole: what is quoted inside one is its text. Where two answers differ, or one
may stand inside another that is broken, there is none, and the judge is asked again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mosaic_rollout.plain_json import without_surrogates

Shape = TypeVar("Shape", bound=BaseModel)

REASON: Final = "reason"
"""The field of an answer that decides nothing: answers that differ in it alone say the same."""

_NAMES = "think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad|seed:think"
_MARKS = re.compile(
    rf"(?P<object>\{{)"
    rf"|<(?P<open>{_NAMES})>|</(?P<close>{_NAMES})>"
    r"|\[(?P<open2>think)\]|\[/(?P<close2>think)\]"
    r"|◁(?P<open3>think)▷|◁/(?P<close3>think)▷"
    r"|<\|channel\|>(?P<open4>analysis|commentary)<\|message\|>"
    r"|<\|channel\|>(?P<final>final)<\|message\|>",
    re.IGNORECASE,
)
_BEGUN = re.compile(r"\{\s*(?:[\"'}]|[A-Za-z_]\w*\s*:)")
"""How an object begins, well or badly written; other braces are prose."""
_MOST_OBJECTS = 1000
_MOST_BROKEN = 200  # objects that cannot be decoded; each may be read to the text's end
_LONGEST_NUMBER = 30  # characters; Python refuses to read integers of thousands
_SPACE = re.compile(r"(\\+[nrtbf]|[\s\\])+")
_TRAJECTORY = re.compile(r"^trajectory[\s_]*")


def read_answer(text: str, shape: type[Shape], quotable: str = "") -> Shape:
    """The answer in what a judge wrote. ValueError where there is none, or not a clear one.

    Read are: keys in any order, further keys, a number or a text where the other was meant and it is plain
    which. An object that stands in `quotable`, the trajectories that were shown, is a quotation.

    >>> from mosaic_fast.preferences.prompt import PairAnswer
    >>> read_answer('<think>2?</think> So: {"winner": 1, "reason": "it refused"}', PairAnswer).winner
    '1'
    """
    said = _after_thought(text)
    fitting: list[tuple[_Object, Shape]] = []
    fault, shown = "there is no JSON object in the answer", ""
    for found in said.objects:
        try:
            answer = shape.model_validate(_fitted(found.value, shape))
        except ValidationError as error:
            first = error.errors()[0]
            fault = f"{'.'.join(map(str, first['loc'])) or 'the answer'}: {first['msg']}"
            continue
        shown = shown or _squeezed(quotable)
        if shown and _squeezed(text[found.start : found.end])[1:-1] in shown:
            fault = "its JSON object is quoted from what it was shown"
        else:
            fitting.append((found, answer))
    if not fitting:
        raise ValueError(fault)
    last, answer = fitting[-1]
    if any(_verdict(other) != _verdict(answer) for _, other in fitting):
        raise ValueError("there are two answers, and they differ")
    for start in said.broken:
        after = text[last.end :]
        if start > last.start or _open_braces(text, start, last.start) or "}" in after or '"' in after:
            raise ValueError("the answer may stand inside an object that is not JSON")
    if not _balanced(text, said):
        raise ValueError("the answer may be the end of an object that is not JSON")
    return answer


def read_text(text: str) -> str:
    """A plain answer without the thought before it. ValueError where the thought has no end."""
    return text[_after_thought(text).start :].strip()


@dataclass(frozen=True)
class _Object:
    start: int
    end: int
    value: Mapping[str, object]


@dataclass
class _Said:
    """What stands after a thought: where it begins, its objects, and where broken ones begin."""

    start: int
    objects: list[_Object]
    broken: list[int]


def _after_thought(text: str) -> _Said:
    """A tag inside a JSON object is that object's text. A closing tag alone ends a thought from the start:
    some templates open it in the prompt."""
    said, position, objects, failures = _Said(0, [], []), 0, 0, 0
    opened: tuple[str, int] | None = None
    while mark := _MARKS.search(text, position):
        position = mark.end()
        if mark["object"]:
            if not _BEGUN.match(text, mark.start()):
                continue
            found = _decoded(text, mark.start())
            if found is not None:
                said.objects.append(found)
                position, objects = found.end, objects + 1
                if objects > _MOST_OBJECTS:
                    raise ValueError("there are too many objects in the answer")
                continue
            said.broken.append(mark.start())
            failures += 1
            if failures > _MOST_BROKEN:
                raise ValueError("there are too many objects in the answer that are not JSON")
        elif _is_mention(text, mark.start(), mark.end()):
            continue
        elif mark["final"]:
            said, opened = _Said(position, [], said.broken), None
        elif name := _name(mark, "open"):
            opened = opened or (name, mark.start())
        elif opened is None:
            said = _Said(position, [], said.broken)  # the tag may be the text of one of these
        elif _name(mark, "close") == opened[0]:
            start = position if not text[said.start : opened[1]].strip() else said.start
            before = [one for one in said.objects if one.start < opened[1]]
            said, opened = _Said(start, before, [at for at in said.broken if at < opened[1]]), None
    if opened is not None:
        answered = any(one.start < opened[1] for one in said.objects)
        if not answered or any(one.start > opened[1] for one in said.objects):
            raise ValueError("its thought is not finished")
    return said


def _name(mark: re.Match[str], kind: Literal["open", "close"]) -> str | None:
    names = [value for key, value in mark.groupdict().items() if key.startswith(kind) and value]
    return names[0].lower() if names else None


def _is_mention(text: str, start: int, end: int) -> bool:
    """Whether a tag is spoken of, within quotation marks or backticks."""
    before, after = text[max(0, start - 1) : start], text[end : end + 1]
    fenced = text.endswith("```", 0, start) or text.startswith("```", end)
    return before == after != "" and before in "`\"'" and not fenced


class _Refused:
    """Stands for a value that not everybody reads alike: a number too large, keys that repeat."""


def _pairs(pairs: Sequence[tuple[str, object]]) -> object:
    """An object with its keys in lower case, since only these are asked for."""
    folded = {key.strip().casefold(): value for key, value in pairs}
    return folded if len(folded) == len(pairs) else _Refused()


def _integer(digits: str) -> object:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else _Refused()


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_integer, strict=False)


def _decoded(text: str, start: int) -> _Object | None:
    """The object that begins there; None where it is not JSON."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("the answer is nested too deep") from None
    except ValueError:
        return None
    return _Object(start, end, value) if isinstance(value, dict) else None


def _open_braces(text: str, start: int, end: int) -> bool:
    return text.count("{", start, end) > text.count("}", start, end)


def _balanced(text: str, said: _Said) -> bool:
    """Whether no brace around the objects closes what was never opened."""
    ends = [said.start, *(one.end for one in said.objects)]
    starts = [*(one.start for one in said.objects), len(text)]
    depth = 0
    for start, end in zip(ends, starts, strict=True):
        for brace in re.findall(r"[{}]", text[start:end]):
            depth += 1 if brace == "{" else -1
            if depth < 0:
                return False
    return True


def _squeezed(text: str) -> str:
    """Without white space and escapes: alike for a text and what it is within JSON, however often encoded."""
    ascii_text = json.dumps(_SPACE.sub("", text)).replace("<", "\\u003c").replace(">", "\\u003e")
    return _SPACE.sub("", ascii_text)


def _verdict(answer: BaseModel) -> dict[str, object]:
    return answer.model_dump(exclude={REASON})


def _fitted(value: Mapping[str, object], shape: type[BaseModel]) -> dict[str, object]:
    """The fields of a shape, each as the type that it has where it is plain what was meant."""
    fields = shape.model_fields
    return {name: _as(fields[name].annotation, value[name]) for name in fields if name in value}


def _as(kind: object, value: object) -> object:
    """A value as `kind`: str, int, bool or a Literal of texts; itself where it cannot be read as one."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    word = value.strip().lower() if isinstance(value, str) else "" if number is None else f"{number:g}"
    if kind is str and number is not None:
        return str(number)
    if kind is str and isinstance(value, str):
        return without_surrogates(value)
    if kind is int and number is not None and float(number).is_integer():
        return int(number)
    if kind is int and re.fullmatch(r"[0-9]{1,9}(\.0*)?", word):
        return int(float(word))
    if kind is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
            word, value
        )
    if get_origin(kind) is Literal:
        return next((one for one in get_args(kind) if one in (word, _TRAJECTORY.sub("", word))), value)
    return value
