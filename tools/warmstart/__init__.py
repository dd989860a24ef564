"""The cold start of the embedded model: supervised learning on scripted trajectories, safe and unsafe.

    python -m tools.warmstart --out DIR

rebuilds the weights in `mosaic_fast/setup/embedded`; the same machine and versions give the same bytes.
"""
