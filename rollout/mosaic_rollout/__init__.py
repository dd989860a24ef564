"""Rollouts: engines, the plan-check-act loop, branching and environments.

Token in, token out: the token ids an engine sampled are the truth; text is never re-tokenised to train on it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mosaic_rollout.chat.chat import Chat
    from mosaic_rollout.engine import LocalEngine
    from mosaic_rollout.errors import UserError
    from mosaic_rollout.loop.agent_loop import AgentLoop, Limits
    from mosaic_rollout.types import (
        Completion,
        Engine,
        Environment,
        Episode,
        Observation,
        Request,
        Rollout,
        SamplingParams,
        Task,
        ToolCall,
        Verdict,
    )

__all__ = [
    "AgentLoop",
    "Chat",
    "Completion",
    "Engine",
    "Environment",
    "Episode",
    "Limits",
    "LocalEngine",
    "Observation",
    "Request",
    "Rollout",
    "SamplingParams",
    "Task",
    "ToolCall",
    "UserError",
    "Verdict",
]

_MODULES = {
    "AgentLoop": "loop.agent_loop",
    "Chat": "chat.chat",
    "Limits": "loop.agent_loop",
    "LocalEngine": "engine",
    "UserError": "errors",
}
"""Where a name is, if not among the data contracts."""


def __getattr__(name: str) -> object:
    """Import what is asked for, and no more: environments need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'types')}"), name)
