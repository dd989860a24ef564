"""How much memory a run will take, by component, from the model's config.json alone."""

from mosaic_fast.setup.memory.estimate import Component, Estimate, estimate_memory, microbatch_tokens
from mosaic_fast.setup.memory.table import dry_run

__all__ = ["Component", "Estimate", "dry_run", "estimate_memory", "microbatch_tokens"]
