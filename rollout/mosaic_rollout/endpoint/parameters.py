"""The parameters of a chat request, as one server takes them: some are renamed or left out.

OpenAI's newer models refuse `max_tokens` and any temperature but their own, other servers a JSON schema or a
seed. What a server refuses by name (HTTP 400 or 422) is changed once for it and remembered; what it says of a
value that is out of its range is the user's to mend.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from mosaic_rollout.errors import UserError
from mosaic_rollout.plain_json import read_json

if TYPE_CHECKING:  # a configuration is read without it
    import httpx

CHANGES: Final[Mapping[str, tuple[str | None, ...]]] = {
    "max_tokens": ("max_completion_tokens",),
    "temperature": (None,),
    "seed": (None,),
    "response_format": ("json_object", None),
}
"""Parameter -> what becomes of it, step by step, while the server refuses it. None: it is left out."""
_CALLED: Final = {
    "response_format": r"response_format|json_schema|json_object|structured[ _]outputs?|guided_json"
}
_OF_VALUE = re.compile(
    r"\b(between|at (most|least)|m(ax|in)imum|(less|greater|more) than|range|exceeds?)\b"
    r"|\btoo (large|small|high|low|big|long)\b|[<>≤≥]",
    re.IGNORECASE,
)
_LONGEST_READ = 2000  # characters of a complaint: a server may repeat the whole request in it
TOO_LONG: Final = (
    "context_length_exceeded",
    "maximum context length",
    "longer than the model",
    "context length",
)
"""How servers say that a conversation does not fit the model's context."""


class Parameters:
    """What one server takes. `given`: the user's changes, as `NAME=OTHER`, or `NAME=` to leave it out."""

    def __init__(self, given: Sequence[str] = ()) -> None:
        self._given = dict(read_change(change) for change in given)
        self._now: dict[str, str | None] = dict(self._given)

    def sent(self, asked: Mapping[str, object]) -> dict[str, object]:
        """The request as this server takes it."""
        sent: dict[str, object] = {}
        for name, value in asked.items():
            other = self._now.get(name, name)
            if name == "response_format" and other == "json_object":
                sent[name] = {"type": "json_object"}
            elif other is not None:
                sent[other] = value
        return sent

    def change_after(self, asked: Mapping[str, object], sent: object, response: httpx.Response) -> str | None:
        """What to say of a refusal that another request may mend; None where none will.

        sent: what was refused. Empty: the parameters were changed meanwhile, and nothing is new.
        """
        if response.status_code not in (400, 422):
            return None
        if self.sent(asked) != sent:
            return ""
        name = self._refused(asked, response)
        if name is None or name in self._given:
            return None
        steps, now = (name, *CHANGES[name]), self._now.get(name, name)
        if now == steps[-1]:
            return None
        self._now[name] = steps[steps.index(now) + 1]
        return _described(name, self._now[name])

    @property
    def changes(self) -> tuple[str, ...]:
        """What is asked in another way than it is configured; decides answers as much as the values do."""
        return tuple(_described(name, other) for name, other in sorted(self._now.items()))

    def _refused(self, asked: Mapping[str, object], response: httpx.Response) -> str | None:
        """The parameter that a server's complaint is about: the one it points at, else the first it names."""
        complaint = _Complaint(response.text)
        if any(sign in complaint.message.lower() for sign in TOO_LONG):
            return None
        names = {name: self._called(name) for name in asked if name in CHANGES}
        pointed_at = [
            name for place in complaint.places for name, form in names.items() if re.fullmatch(form, place)
        ]
        named = sorted(
            (found.start(), name)
            for name, form in names.items()
            if (found := re.search(rf"(?<!\w)({form})(?!\w)", complaint.message))
        )
        refused = [*pointed_at, *(name for _, name in named)]
        if not refused or (complaint.of_value and refused[0] != "response_format"):
            return None
        return refused[0]

    def _called(self, name: str) -> str:
        """A regular expression for what a server may call a parameter."""
        return _CALLED.get(name) or re.escape(self._now.get(name) or name)


class _Complaint:
    """What a server says is wrong: the parameters it points at, its words, and whether a value is meant."""

    def __init__(self, body: str) -> None:
        try:
            whole = read_json(body)
        except ValueError:
            whole = body
        error = whole.get("error", whole) if isinstance(whole, Mapping) else whole
        self.message = " ".join(_texts(error))[:_LONGEST_READ]
        self.places = [re.split(r"[.\[]", place)[0] for place in _places(error)]
        code = str(error.get("code", "")) if isinstance(error, Mapping) else ""
        self.of_value = not code.startswith("unsupported") and _OF_VALUE.search(self.message) is not None


def _texts(error: object) -> Iterator[str]:
    """The words of a complaint, in the forms of OpenAI, vLLM, SGLang and FastAPI; not what it repeats."""
    if isinstance(error, str):
        yield error
    elif isinstance(error, Mapping):
        for key in ("message", "msg", "detail"):
            yield from _texts(error.get(key))
    elif isinstance(error, list):
        for one in error:
            yield from _texts(one)


def _places(error: object) -> Iterator[str]:
    """The parameters that a complaint says it is about."""
    if isinstance(error, Mapping):
        if isinstance(param := error.get("param"), str):
            yield param
        loc = error.get("loc")
        yield from (str(part) for part in loc if isinstance(part, str)) if isinstance(loc, list) else ()
        yield from _places(error.get("detail"))
    elif isinstance(error, list):
        for one in error:
            yield from _places(one)


def read_change(change: str) -> tuple[str, str | None]:
    """(parameter, what it is sent as or None) of `NAME=OTHER`. UserError where it is none."""
    name, equals, other = change.partition("=")
    if not equals or name not in CHANGES or (other and not re.fullmatch(r"[A-Za-z_]\w*", other, re.ASCII)):
        raise UserError(
            f"{change!r} changes no parameter: write NAME=OTHER to send it under another name, or NAME= to "
            f"leave it out, where NAME is {', '.join(CHANGES)}; response_format=json_object asks for JSON "
            "without a schema"
        )
    if name == "response_format" and other not in ("", "json_object"):
        raise UserError(f"{change!r}: response_format can be json_object, or be left out")
    return name, other or None


def _described(name: str, other: str | None) -> str:
    return f"{name} left out" if other is None else f"{name} as {other}"
