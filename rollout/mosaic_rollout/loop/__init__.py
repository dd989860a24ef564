"""The plan-check-act loop: episodes played by a policy, their tools, and where rollouts of a group fork.

`AgentLoop` plays in tokens, for training. `ChatAgent` (chat_agent.py) plays over an OpenAI-compatible
endpoint, for evaluation; it is imported where it is asked for, as it brings an HTTP client.
"""

from mosaic_rollout.loop.agent_loop import AgentLoop, Branching
from mosaic_rollout.loop.play import Limits
from mosaic_rollout.loop.tools import UNRESOLVED, EpisodeTools, ToolRunner

__all__ = ["UNRESOLVED", "AgentLoop", "Branching", "EpisodeTools", "Limits", "ToolRunner"]
