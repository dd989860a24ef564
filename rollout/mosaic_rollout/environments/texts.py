"""Tool outputs as texts a policy can be shown."""

from __future__ import annotations

import json


def as_text(result: object) -> str:
    """What a tool returned: a text as it is, anything else as JSON where it can be, else by its str()."""
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(result)


def bounded(text: str, limit_chars: int) -> str:
    """The text, cut after `limit_chars`, saying so.

    >>> bounded("abcdef", 4)
    'abcd\\n[2 more characters are not shown]'
    """
    text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenised
    if len(text) <= limit_chars:
        return text
    return f"{text[:limit_chars]}\n[{len(text) - limit_chars} more characters are not shown]"
