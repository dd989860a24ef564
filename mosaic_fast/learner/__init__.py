"""One update on the rollouts of a step: batch, micro-batches and their cost, optimiser, checkpoint.

`learner.py` is the update; `execution/` decides which forwards run and in which order, by the cost model that
`calibrate/` measures. Nothing is imported here, so that commands answer without torch.
"""
