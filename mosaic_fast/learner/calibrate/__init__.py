"""What forwards and backwards cost on this machine: `python -m mosaic_fast.learner.calibrate [--out FILE]`.

Small random Qwen3 models run forests of different shapes in different ways (`probes.py`), in turn
(`timing.py`); the coefficients are those that predict the times best (`fit.py`), and how well they do is
printed (`table.py`). Training itself never measures anything to decide how a forest is run.
"""
