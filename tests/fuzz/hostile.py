"""Random texts, values and damage, all drawn from the generator given."""

from __future__ import annotations

import json
from random import Random

PIECES = (
    *("<think>", "</think>", "<safety_thoughts>", "</safety_thoughts>", "<tool_call>", "</tool_call>"),
    *("<|tool_call|>", "<|/tool_call|>", "<|python_tag|>", "<|im_start|>", "<|im_end|>", "<|end|>"),
    *('{"name": "read_file", "arguments": {"path": "a.txt"}}', '{"name": "refusal_tool", "arguments": {}}'),
    *('{"name":', '"arguments":', '"parameters": {', "}", "{", "[", "]", '"', "\\", "\\ud83d", "\\u0000"),
    *("<script>alert(1)</script>", "</script>", "<!--", "]]>", "<img src=x onerror=alert(1)>", "&lt;"),
    *(
        "\x00",
        "\x1b[31m",
        "\r\n",
        "\n",
        "\t",
        " ",
        "\u2028",
        "\ufeff",
        "\u202e",
        "\ufffd",
        "é",
        "漢",
        "😀",
        "e\u0301",
    ),
    *(
        "NaN",
        "Infinity",
        "1e999",
        "-0",
        "9" * 25,
        "0x1f",
        "null",
        "true",
        "[/red]",
        "[bold]",
        "%s",
        "{0}",
        "${HOME}",
    ),
    *(
        "../../etc/passwd",
        "'; DROP TABLE answers; --",
        "$(id)",
        "`id`",
        "a",
        "word ",
        "read_file",
        "refusal_tool",
    ),
)
MEGABYTE = 1_000_000
_LONG = b"9" * 5000  # Python's own readers give up on a number of so many digits


def text(random: Random, *, longest: int = 30, megabytes: bool = False) -> str:
    """Pieces in a row; one in fifty is a megabyte long if `megabytes`."""
    if megabytes and random.random() < 0.02:
        piece = random.choice(PIECES)
        return (piece * (MEGABYTE // len(piece) + 1))[:MEGABYTE] + random.choice(PIECES)
    return "".join(random.choice(PIECES) for _ in range(random.randrange(longest)))


def value(random: Random, depth: int = 0) -> object:
    """Any JSON value; now and then one that is nested a thousand deep."""
    if depth == 0 and random.random() < 0.02:
        return nested(random)
    kind = random.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 8:
        return {text(random, longest=3): value(random, depth + 1) for _ in range(random.randrange(4))}
    plain = (
        *(None, random.random() < 0.5, random.choice((0, 1, -1, 2**31, 2**63, 10**30, -(2**70)))),
        *(random.choice((0.5, -1.0, 1e-320, 1e308, float("inf"), float("nan"))), text(random), ""),
        random.randrange(-5, 1000),
    )
    return plain[kind]


def nested(random: Random) -> object:
    """Lists or objects in each other, less deep than Python's own writer gives up."""
    found: object = "x"
    for _ in range(random.choice((60, 70, 500))):
        found = [found] if random.random() < 0.5 else {"a": found}
    return found


def changed(random: Random, whole: object) -> object:
    """A copy of a JSON value with one of its parts replaced, left out or given another name."""
    found = json.loads(json.dumps(whole))  # copy.deepcopy gives up where values are nested deep
    inner = found
    while True:
        if not isinstance(inner, dict | list) or not inner:
            return value(random)
        key = random.choice(list(inner)) if isinstance(inner, dict) else random.randrange(len(inner))
        below = inner[key]  # pyrefly: ignore [bad-index]
        if isinstance(below, dict | list) and below and random.random() < 0.7:
            inner = below
            continue
        how = random.randrange(4)
        if how == 0:
            del inner[key]  # pyrefly: ignore [unsupported-operation]
        elif how == 1 and isinstance(inner, dict):
            inner[text(random, longest=4)] = inner.pop(key)
        else:
            inner[key] = value(random)  # pyrefly: ignore [unsupported-operation]
        return found


def damaged(random: Random, content: bytes) -> bytes:
    """Bytes cut short, flipped, left out, doubled or put in."""
    for _ in range(random.randrange(1, 4)):
        place = random.randrange(len(content) + 1)
        how = random.randrange(5)
        if how == 0:
            content = content[:place]
        elif how == 1 and place < len(content):
            content = (
                content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]
            )
        elif how == 2:
            content = content[:place] + content[place + random.randrange(1, 40) :]
        elif how == 3:
            content = content[:place] + content[max(0, place - random.randrange(1, 60)) :]
        else:
            content = (
                content[:place]
                + random.choice((b"\x00", b"\xff\xfe", b"\n", b'"', b"]", _LONG, text(random).encode()))
                + content[place:]
            )
    return content


def written(found: object) -> str:
    """JSON as a sloppy server writes it: NaN and infinities included."""
    return json.dumps(found)
