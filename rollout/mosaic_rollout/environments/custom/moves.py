"""What a user's `demonstrate` shows: a list of turns, or a generator that is sent what follows each.

def demonstrate(self, task):  # the row of tasks.jsonl; in a whole environment the Task
    found = yield {"plan": "look the salary up", "name": "lookup", "arguments": {"person": "alice"}}
    yield {"plan": "done", "answer": f"It is {found}."}        # or {"refuse": "it is private"}
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from types import GeneratorType

from mosaic_rollout.chat.grammar import REFUSAL_TOOL
from mosaic_rollout.errors import UserError
from mosaic_rollout.foreign import ForeignCode
from mosaic_rollout.foreign.checks import shown
from mosaic_rollout.plain_json import check_plain
from mosaic_rollout.types import Move, Moves, ToolCall

_KEYS = {"plan", "check", "name", "arguments", "answer", "refuse"}
_END = object()


def shown_moves(code: ForeignCode, what: str, function: Callable[..., object], *arguments: object) -> Moves:
    """The turns that a user's function shows. UserError names the function where one is none."""
    found = code.demand(what, lambda: [function(*arguments)])  # within a list, since it may be a generator
    made = found[0] if isinstance(found, list) else None
    if isinstance(made, GeneratorType):
        return _generated(code, what, made)
    if not isinstance(made, Sequence) or isinstance(made, str):
        raise UserError(f"{what} must give a list of turns or be a generator of them, it gives {shown(made)}")
    return [_move(what, one) for one in made]


def _generated(
    code: ForeignCode, what: str, made: GeneratorType[object, object, object]
) -> Generator[Move, str, None]:
    def after(observation: str | None) -> object:
        try:
            return made.send(observation)
        except StopIteration:
            return _END

    found = code.demand(what, after, None)
    while found is not _END:
        observation = yield _move(what, found)
        found = code.demand(what, after, observation)


def _move(what: str, found: object) -> Move:
    """A turn: a Move or a ToolCall of mosaic_rollout.types, an answer's text, or a mapping of `_KEYS`."""
    if isinstance(found, Move):
        move = found
    elif isinstance(found, ToolCall):
        move = Move(call=found)
    elif isinstance(found, str):
        move = Move(answer=found)
    elif isinstance(found, Mapping) and set(found) <= _KEYS:
        name, refuse = found.get("name"), found.get("refuse")
        call = None if name is None else ToolCall(str(name), dict(found.get("arguments") or {}))
        if refuse is not None:
            call = ToolCall(REFUSAL_TOOL, {"reason": str(refuse)})
        move = Move(found.get("plan"), found.get("check"), call, found.get("answer"))
    else:
        raise UserError(f"{what}: a turn is an object with {', '.join(sorted(_KEYS))}, not {shown(found)}")
    texts = (move.plan, move.check, move.answer)
    if (move.call is None) == (not move.answer) or not all(isinstance(t, str | None) for t in texts):
        raise UserError(f"{what}: a turn makes one call, or gives one answer, it is {shown(found)}")
    if move.call is not None:
        try:
            check_plain(move.call.arguments)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{what}: the arguments of {move.call.name} are no JSON: {error}") from None
    return move
