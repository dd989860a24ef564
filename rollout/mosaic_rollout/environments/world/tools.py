"""The simulated tools and the state that they act on. Every attempt at a side effect is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field

from mosaic_rollout.environments.world.tasks import SIDE_EFFECT_TOOLS, WorldTask
from mosaic_rollout.types import JsonValue, Observation, ToolCall, ToolSchema

TOOL_ARGUMENTS: dict[str, dict[str, str]] = {
    "read_file": {"path": "Name of the file."},
    "send_email": {"to": "Full name of the recipient.", "body": "Text of the mail."},
    "transfer_money": {"to": "Full name of the recipient.", "amount": "Whole dollars, digits only."},
    "search_web": {"query": "What to look for."},
    "delete_file": {"path": "Name of the file."},
    "post_message": {"channel": "Name of the channel.", "text": "Text of the message."},
}
MAX_DIGITS = 15
"""Of an amount; the account has never held more, and Python reads no number of thousands of digits."""
_DESCRIPTIONS = {
    "read_file": "Read a file.",
    "send_email": "Send a mail.",
    "transfer_money": "Transfer money from the team's account. Cannot be undone.",
    "search_web": "Search the web.",
    "delete_file": "Delete a file. Cannot be undone.",
    "post_message": "Post a message in a channel.",
}


def _schema(name: str) -> ToolSchema:
    arguments = TOOL_ARGUMENTS[name]
    properties = {key: {"type": "string", "description": text} for key, text in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    function = {"name": name, "description": _DESCRIPTIONS[name], "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS: tuple[ToolSchema, ...] = tuple(_schema(name) for name in TOOL_ARGUMENTS)


@dataclass(frozen=True)
class Effect:
    """One attempt at a side effect. A call with broken arguments is an attempt that was not carried out."""

    call: ToolCall
    carried_out: bool


@dataclass
class World:
    """Files, mail, payments and channels of one episode."""

    files: dict[str, str]
    facts: dict[str, str]
    mails: list[tuple[str, str]] = field(default_factory=list)
    payments: list[tuple[str, int]] = field(default_factory=list)
    posts: list[tuple[str, str]] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)

    @classmethod
    def of(cls, task: WorldTask) -> World:
        return cls(dict(task.files), dict(task.facts))

    def run(self, call: ToolCall) -> Observation:
        """Carry out one call; what cannot be carried out comes back as an error observation."""
        if call.name not in TOOL_ARGUMENTS:
            return Observation("no such tool.", is_error=True)
        if set(call.arguments) != set(TOOL_ARGUMENTS[call.name]):
            observation = Observation("wrong arguments.", is_error=True)
        else:
            observation = self._act(call.name, {key: as_text(v) for key, v in call.arguments.items()})
        if call.name in SIDE_EFFECT_TOOLS:
            self.effects.append(Effect(call, not observation.is_error))
        return observation

    def _act(self, name: str, arguments: dict[str, str]) -> Observation:
        match name:
            case "read_file":
                content = self.files.get(arguments["path"])
                return (
                    Observation("no such file.", is_error=True) if content is None else Observation(content)
                )
            case "search_web":
                return Observation(f"found: {self.facts.get(arguments['query'], 'nothing')}.")
            case "send_email":
                self.mails.append((arguments["to"], arguments["body"]))
                return Observation("sent.")
            case "transfer_money":
                digits = arguments["amount"]
                if not digits.isascii() or not digits.isdigit() or len(digits) > MAX_DIGITS:
                    return Observation("wrong amount.", is_error=True)
                self.payments.append((arguments["to"], int(digits)))
                return Observation("paid.")
            case "delete_file":
                if self.files.pop(arguments["path"], None) is None:
                    return Observation("no such file.", is_error=True)
                return Observation("deleted.")
            case _:
                self.posts.append((arguments["channel"], arguments["text"]))
                return Observation("posted.")


def as_text(value: JsonValue) -> str:
    """An argument as the tools read it: case and surrounding space do not matter. What has no text is empty.

    That is an integer with more digits than Python writes, or a value without an end; no JSON of a policy's.
    """
    try:
        return str(value).strip().lower()
    except (ValueError, RecursionError):
        return ""
