"""Scores of a model on a manifest, with intervals and the no-audio baseline."""

from pal.evaluate.runner import evaluate
from pal.evaluate.score import Accuracy, ItemResult, Score

__all__ = ["Accuracy", "ItemResult", "Score", "evaluate"]
