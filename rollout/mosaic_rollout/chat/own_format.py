"""The call format that a configuration names: one of ours, or a user's own, looked at as it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mosaic_rollout.chat.call_formats import FORMATS
from mosaic_rollout.chat.written_call import CallFormat, WrittenCall
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.checks import shown
from mosaic_rollout.foreign.code import call_named, import_named
from mosaic_rollout.types import ToolCall, ToolSchema

_KEY = "rollout.call_format"


def load_call_format(name: str) -> CallFormat | None:
    """The format of a name; None for `auto`, which leaves it to the chat template.

    `module:Class` names a subclass of CallFormat that is made without arguments; the working directory is
    searched first. UserError for a name that nothing has, and for a class that is none.
    """
    if name == "auto":
        return None
    if ":" not in name:
        known = {one.name: one for one in FORMATS}
        if name not in known:
            raise UserError(
                f"{_KEY} {name!r} is none of auto, {', '.join(known)}, nor your own as module:Class"
            )
        return known[name]
    made = call_named(name, _KEY, import_named(name, _KEY))
    if not isinstance(made, CallFormat):
        raise UserError(
            f"{_KEY} {name!r}: it must be a subclass of CallFormat of mosaic_rollout.chat.call_formats, it "
            f"makes {shown(made)}"
        )
    if not isinstance(made.name, str) or not isinstance(made.marker, str):
        raise UserError(f"{_KEY} {name!r}: its name and marker must be texts")
    return _OwnFormat(made, name)


class _OwnFormat(CallFormat):
    """A user's format: what it raises, or gives that is none of the contract, ends the run in one line."""

    def __init__(self, made: CallFormat, spec: str) -> None:
        super().__init__(made.name, made.marker)
        object.__setattr__(self, "_made", made)
        object.__setattr__(self, "_what", f"{_KEY} {spec!r}")

    _made: CallFormat
    _what: str

    def at(self, text: str, start: int) -> WrittenCall | None:
        found = self._demand(self._made.at, text, start)
        if found is not None and not (isinstance(found, WrittenCall) and found.start == start):
            raise UserError(
                f"{self._what}: at must give a WrittenCall from {start} on or None, not {shown(found)}"
            )
        return found

    def parse(self, body: str, tools: Sequence[ToolSchema] = ()) -> ToolCall | None:
        found = self._demand(self._made.parse, body, tools)
        if found is not None and not isinstance(found, ToolCall):
            raise UserError(f"{self._what}: parse must give a ToolCall or None, not {shown(found)}")
        return found

    def write(self, call: ToolCall) -> str:
        found = self._demand(self._made.write, call)
        if not isinstance(found, str):
            raise UserError(f"{self._what}: write must give a text, not {shown(found)}")
        return found

    def find(self, text: str) -> list[WrittenCall]:
        found = self._demand(self._made.find, text)
        if not isinstance(found, list) or not all(isinstance(call, WrittenCall) for call in found):
            raise UserError(f"{self._what}: find must give a list of WrittenCall, not {shown(found)}")
        return found

    def _demand(self, method: Callable[..., object], *arguments: object) -> object:
        name = getattr(method, "__name__", "a method")
        return ForeignCode(self._what).demand(f"{self._what}: {name}", method, *arguments)
