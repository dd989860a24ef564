"""The forest: rollouts as prefix trees in depth-first order, exact cuts of it, and what sharing is worth.

`layout.py` needs numpy alone; `split.py` cuts a forest, `ideal.py` counts what sharing saves.
"""

from mosaic_kernels.forest.layout import BoolArray, IntArray, PackedForest, pack_forest

__all__ = ["BoolArray", "IntArray", "PackedForest", "pack_forest"]
