"""Which addresses of a server a configuration may hold."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def is_plain_url(url: str) -> bool:
    """Whether it is an http(s) URL with a host and without a user, a password or white space."""
    try:
        parts = urlsplit(url)
        return (
            re.fullmatch(r"https?://[^@\s]+", url) is not None
            and url.isascii()
            and url.isprintable()
            and re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.]+", parts.hostname or "") is not None
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:  # a port that is no number, a bracket that is not closed
        return False
