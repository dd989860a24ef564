"""Exact prefix sharing inside trainers of others, which keep their losses, data and loops.

`trl.py` is for TRL's trainers, `rows.py` for any loop whose batch is padded rows: it makes a forest of them.
"""

from mosaic_fast.integrations.rows import row_logprobs

__all__ = ["row_logprobs"]
