"""What a run keeps and shows: its folder, trajectories, metrics, progress, curves, trackers.

Nothing is imported here, so that commands answer without torch.
"""
