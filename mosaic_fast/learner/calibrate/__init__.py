"""What forwards and backwards cost on this machine: `python -m mosaic_fast.learner.calibrate [--out FILE]`.

Small random Qwen3 models run forests of different shapes in different ways, in turn. The coefficients are
those that predict the times best, and how well they do is printed. Training itself never measures anything to
decide how a forest is run.
"""
