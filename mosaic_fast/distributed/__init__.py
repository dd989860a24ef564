"""A run on several ranks: who they are, how weights and work are spread over them, and who watches whom."""

from mosaic_fast.distributed.world import ALONE, World, joined_world

__all__ = ["ALONE", "World", "joined_world"]
