"""What a user may have meant by a name that there is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


def nearest(name: str, there: Iterable[str]) -> str | None:
    """The name most like this one, case and `-` for `_` apart; None where none is much like it.

    >>> nearest("grup-size", ["group_size", "max_steps"])
    'group_size'
    """
    plain = {_plain(one): one for one in there}
    close = get_close_matches(_plain(name), plain, n=1, cutoff=0.7)
    return plain[close[0]] if close else None


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """Likewise of `section.name` keys: one of the whole, else one whose name alone is meant.

    Where several sections have that name, it is the section most like the one that was written.

    >>> nearest_key("group_size", ["seed", "rollout.group_size"])
    'rollout.group_size'
    >>> nearest_key("enviroment.name", ["env.name", "judge.name", "loss.name"])
    'env.name'
    """
    there = list(keys)
    section, _, name = key.rpartition(".")
    own = {one.rpartition(".")[2]: one for one in there if one.rpartition(".")[0] == section}
    if (close := nearest(name, own)) is not None:
        return own[close]
    there.sort(key=lambda one: SequenceMatcher(None, one.rpartition(".")[0], _plain(section)).ratio())
    by_name = {one.rpartition(".")[2]: one for one in there}  # the last one, so the most alike
    close = nearest(key, there) or by_name.get(name.replace("-", "_"))
    if close is None and (close := nearest(name, by_name)) is not None:
        close = by_name[close]
    return close


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
