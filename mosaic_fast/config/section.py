"""What every section of the configuration is made of.

Which addresses of a server a configuration may hold: none with a key, since configurations are kept.
"""

from __future__ import annotations

import re
from typing import Annotated, Final
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
_MOST = 2**31  # what PyTorch and numpy take everywhere
Count = Annotated[int, Field(ge=1, lt=_MOST)]
CountOrZero = Annotated[int, Field(ge=0, lt=_MOST)]


class Section(BaseModel):
    """A section refuses keys it does not know, and cannot be changed once made."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: object) -> object:
        """A NUL is in no path or address, and half a surrogate pair (a byte that is no UTF-8) in no file."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and ("\0" in text or (not text.isascii() and _halves(text))):
                raise PydanticCustomError("text", "it has a NUL, or a byte that is no UTF-8")
        return value


def _halves(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def is_own(name: str) -> bool:
    """Whether a name is `module:Class` or `module:function`: something of the user's own."""
    return re.fullmatch(r"[\w.]+:\w+", name) is not None


PLAIN_URL: Final = "an http(s) address without a user, a key, a question mark or a # in it"

_KEY_PREFIX = re.compile(
    r"(sk|pk|rk|hf|gsk|xai|ghp|glpat|api[-_]?key|key|token|secret|bearer)[-_:.]\w|AIza\w", re.I
)
_KEY_NAMES = re.compile(
    r"(api|access|auth|secret)?[-_]?(key|token|secret|password|passwd|auth|credentials?)s?", re.I
)
_PLACES_OF_IDS = re.compile(
    r"accounts?|projects?|organi[sz]ations?|orgs?|deployments?|models?|endpoints?|gateways?", re.I
)
_LONG_WORD, _LONGER_WORD = 16, 24  # characters, from which on such a word may well be a key


def is_plain_url(url: str) -> bool:
    """Whether it is an http(s) URL with a host, without a user, a query, a fragment, white space or a key.

    In its path a key is what looks like one: `sk-...`, what stands behind `key/` or `token/`, and a long word
    of letters and digits mixed, unless it stands where an account or a deployment is named.
    """
    try:
        parts = urlsplit(url)
        return (
            re.fullmatch(r"https?://[^@\s?#]+", url) is not None
            and url.isascii()
            and url.isprintable()
            and re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.]+", parts.hostname or "") is not None
            and (parts.port is None or parts.port > 0)
            and not _has_key(parts.path)
        )
    except ValueError:  # a port that is no number, a bracket that is not closed
        return False


def _has_key(path: str) -> bool:
    """Whether a path has something in it that looks like a key."""
    segments = unquote(path).split("/")
    return any(
        re.search(r"[@=;?#\s]", segment) is not None
        or _KEY_PREFIX.match(segment) is not None
        or (bool(segment) and _KEY_NAMES.fullmatch(before) is not None)
        or (_PLACES_OF_IDS.fullmatch(before) is None and any(map(_is_random, re.split(r"[-_.:~]", segment))))
        for before, segment in zip(["", *segments], segments, strict=False)
    )


def _is_random(word: str) -> bool:
    """Whether it is a long word in which digits and letters are mixed, or capital and small ones."""
    digits, small, capital = (re.search(kind, word) is not None for kind in ("[0-9]", "[a-z]", "[A-Z]"))
    mixed = digits and (small or capital)
    return (mixed and len(word) >= _LONG_WORD) or (small and capital and len(word) >= _LONGER_WORD)
