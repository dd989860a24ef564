"""Between messages and tokens: a model's chat template, the grammar of a turn, the forms of a tool call."""

from mosaic_rollout.chat.chat import Chat

__all__ = ["Chat"]
