"""What can go wrong while sampling. Callers of `generate` see these and nothing else, besides ValueError."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The engine failed while requests were in flight; every one of them gets this error.

    The cause is chained (`__cause__`). The engine has emptied its state and serves the next request.
    """


class NonFiniteLogitsError(EngineError):
    """The model gave NaN or +inf: the weights are broken, so sampling on would only hide it."""
