"""The small model and the options of a short run."""

from tests.learner.conftest import model_folder, options

__all__ = ["model_folder", "options"]
