"""The policy: log-probs of a Hugging Face causal LM on a forest of rollouts.

The model is unmodified. `layout.py` is the one place that recognises a stock decoder layer; `layer.py` runs
it on a forest, and `StockDecoder` for the local engine, without calling a module.
"""

from mosaic_fast.policy.decoder import StockDecoder
from mosaic_fast.policy.policy import Policy

__all__ = ["Policy", "StockDecoder"]
