"""SGLang 0.5.23 as the engine: real servers over HTTP, in an environment of their own (docs/sglang.md)."""

from mosaic_rollout.engine.sglang.engine import SGLangEngine, SGLangOptions
from mosaic_rollout.engine.sglang.lane import LaneOptions
from mosaic_rollout.engine.sglang.ledger import ServingStats
from mosaic_rollout.engine.sglang.server import ServerOptions

__all__ = ["LaneOptions", "SGLangEngine", "SGLangOptions", "ServerOptions", "ServingStats"]
