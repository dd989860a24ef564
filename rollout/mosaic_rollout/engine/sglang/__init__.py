"""SGLang 0.5.23 as the engine: real servers over HTTP, in an environment of their own (docs/sglang.md)."""

from .engine import SGLangEngine, SGLangOptions
from .lane import LaneOptions
from .server import ServerOptions
from .stats import ServingStats

__all__ = ["LaneOptions", "SGLangEngine", "SGLangOptions", "ServerOptions", "ServingStats"]
